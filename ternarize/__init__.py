"""Ternary PyTorch models: {-1, 0, +1} weights, 2 bits each, in training, in serving and on disk."""

from ternarize import errors as errors
from ternarize.api import dequantize as dequantize
from ternarize.api import freeze as freeze
from ternarize.api import ternarize as ternarize
from ternarize.checkpoint import convert as convert
from ternarize.checkpoint import from_pretrained as from_pretrained
from ternarize.checkpoint import load_into as load_into
from ternarize.checkpoint import save_pretrained as save_pretrained
from ternarize.config import TernaryConfig as TernaryConfig
from ternarize.explain import explain as explain
from ternarize.layer import TernaryLinear as TernaryLinear
from ternarize.optim import TernaryOptimizer as TernaryOptimizer
from ternarize.optim import build_optimizer as build_optimizer

"""Checkpoints: read any format, convert to ours, save and load models."""

from ternarize.checkpoint.convert import ConversionReport as ConversionReport
from ternarize.checkpoint.convert import convert as convert
from ternarize.checkpoint.packed import PackedCheckpoint as PackedCheckpoint
from ternarize.checkpoint.pretrained import from_pretrained as from_pretrained
from ternarize.checkpoint.pretrained import load_into as load_into
from ternarize.checkpoint.pretrained import save_pretrained as save_pretrained
from ternarize.checkpoint.read import open_checkpoint as open_checkpoint

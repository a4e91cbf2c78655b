"""GGUF: quantised blocks are dequantised one tensor at a time; names, config and tokenizer become transformers'."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.checkpoint.source import TensorInfo
from ternarize.checkpoint.transformers_model import empty_model
from ternarize.errors import CheckpointError

#: Tensors that transformers computes from its config, so that its models have no place for them.
COMPUTED = frozenset(("rope_freqs.weight",))


class GgufFile:
    """A model in a GGUF file of an architecture whose tensors stand one for one for transformers' parameters.

    Every tensor comes out as float32, which holds the values of all block formats up to the rounding of the format's
    own dequantisation.

    Args:
        path: the file, or the folder that holds it.
        file: the file.

    Raises:
        CheckpointError: if the packages are missing, the file is damaged, or its architecture is not one of those.
    """

    format = "gguf"

    def __init__(self, path: Path, file: Path) -> None:
        try:
            import gguf
            from transformers import AutoConfig
            from transformers.modeling_gguf_pytorch_utils import (
                TENSOR_PROCESSORS,
                TensorProcessor,
                get_gguf_hf_weights_map,
            )
        except ImportError as error:
            raise CheckpointError(
                f"{file}: reading GGUF needs {error.name}: pip install 'ternarize[gguf,transformers]'"
            ) from None
        self.path, self.file = path, file
        try:
            reader = gguf.GGUFReader(file)
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{file} is no GGUF file that transformers reads ({error}): fetch it again, or convert the original"
            ) from None
        config.dtype = torch.float32
        model = empty_model(config.to_dict())
        self.config: dict[str, Any] | None = {**config.to_diff_dict(), "architectures": [type(model).__name__]}
        architecture = reader.fields["general.architecture"].contents()
        self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        names = get_gguf_hf_weights_map(model, self._processor)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.tensors: dict[str, TensorInfo] = {}
        self._blocks: dict[str, Any] = {}
        for blocks in reader.tensors:
            if blocks.name in COMPUTED:
                continue
            name = names.get(blocks.name)
            if name not in shapes:
                raise CheckpointError(
                    f"{file}: tensor {blocks.name!r} has no parameter of {type(model).__name__} to itself; "
                    f"GGUF of architecture {architecture!r} is not supported: convert the original checkpoint"
                )
            self.tensors[name] = TensorInfo(shapes[name], torch.float32)
            self._blocks[name] = blocks

    def load(self, name: str) -> Tensor:
        """One tensor, dequantised to float32, rows in transformers' order."""
        import gguf

        blocks = self._blocks[name]
        values = gguf.dequantize(blocks.data, blocks.tensor_type)
        result = self._processor.process(weights=values, name=blocks.name, parsed_parameters={"tensors": {}})
        # A copy also where nothing was dequantised: the mapped file is read-only, and PyTorch warns of that.
        tensor = torch.tensor(result.weights, dtype=torch.float32)
        if tuple(tensor.shape) != self.tensors[name].shape:
            raise CheckpointError(
                f"{self.file}: tensor {blocks.name!r} is {list(tensor.shape)}, "
                f"need {list(self.tensors[name].shape)} for {name!r}: fetch it again"
            )
        return tensor

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor's quantised blocks."""
        return int(self._blocks[name].n_bytes)

    def save_companions(self, folder: Path) -> None:
        """Write the tokenizer that the file holds."""
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(self.file.parent, gguf_file=self.file.name).save_pretrained(folder)

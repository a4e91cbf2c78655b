"""Reads our own format: what is packed is checked when the folder is opened, its codes and exponents when loaded."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ternarize.checkpoint.format import QUANT_METHOD, TRAINING, WEIGHTS, PackedLayer, packed_layers
from ternarize.checkpoint.safetensors_files import SafetensorsFiles
from ternarize.checkpoint.source import CONFIG_FILE, TensorInfo, files_of_index, quant_method, read_config
from ternarize.errors import CheckpointError
from ternarize.packing import E_MAX, E_MIN, has_illegal_code


class PackedCheckpoint(SafetensorsFiles):
    """A folder that `ternarize convert` or `save_pretrained` wrote.

    Args:
        path: the folder.

    Raises:
        CheckpointError: if the folder holds something else, an unknown version, or tensors that do not fit.
    """

    format = "ternarize"

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        config_file = path / CONFIG_FILE
        if not config_file.is_file():
            raise CheckpointError(f"{path} has no {CONFIG_FILE}: give a folder that `ternarize convert` wrote")
        config = read_config(path) or {}
        if quant_method(config) != QUANT_METHOD:
            raise CheckpointError(f"{config_file} describes no ternary checkpoint: run `ternarize convert` on it first")
        index, single = path / f"{WEIGHTS}.safetensors.index.json", path / f"{WEIGHTS}.safetensors"
        if not index.is_file() and not single.is_file():
            raise CheckpointError(f"{single} is missing: fetch or convert it again")
        super().__init__(path, files_of_index(index) if index.is_file() else [single])
        self.quantization: dict[str, Any] = config["quantization_config"]
        self.layers: dict[str, PackedLayer] = packed_layers(self.quantization, self.tensors, self.file_of, config_file)

    def load(self, name: str) -> Tensor:
        """One tensor: its checksum verified, codes and exponents of packed ones legal."""
        tensor = super().load(name)
        layer, _, kind = name.rpartition(".")
        if layer not in self.layers:
            return tensor
        if kind == "T_packed" and has_illegal_code(tensor):
            raise CheckpointError(
                f"{self.file_of[name]}: tensor {name!r} holds the code 10, which is no trit: convert the original again"
            )
        if kind == "E" and tensor.numel() and int(tensor.min()) < E_MIN:
            raise CheckpointError(
                f"{self.file_of[name]}: tensor {name!r} holds the exponent {int(tensor.min())}, "
                f"need {E_MIN} to {E_MAX}: convert the original again"
            )
        return tensor

    def training_state(self) -> SafetensorsFiles | None:
        """The training planes, if the folder has them, checked by name, shape and dtype."""
        file = self.path / f"{TRAINING}.safetensors"
        if not file.is_file():
            return None
        state = SafetensorsFiles(file, [file])
        needed: dict[str, TensorInfo] = {}
        for name in dict.fromkeys(key.rpartition(".")[0] for key in state.tensors):
            if name not in self.layers:
                raise CheckpointError(
                    f"{file} has state of layer {name!r}, which is not in {self.path}: remove the file"
                )
            needed |= self.layers[name].tensors(name, training=True)
        for key in needed.keys() | state.tensors.keys():
            got = state.tensors.get(key)
            if got != needed.get(key):
                raise CheckpointError(
                    f"{file}: tensor {key!r} is {got or 'missing'}, need {needed.get(key, 'none')} "
                    "by the rule in config.json: remove the file to start training anew"
                )
        return state

"""Files that appear whole or not at all, and whose tensors lie where every reader finds them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ternarize.checkpoint.source import TensorInfo
from ternarize.checkpoint.write import ShardWriter, new_folder, parse_size
from ternarize.errors import ConfigError

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "wide": torch.randn(2, 3, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
}


def write(folder: Path, max_shard_bytes: int) -> list[Path]:
    writer = ShardWriter(folder, "x", {name: TensorInfo.of(t) for name, t in TENSORS.items()}, max_shard_bytes)
    # The order of writing is free.
    for name in reversed(TENSORS):
        writer.write(name, TENSORS[name])
    writer.finish()
    return sorted(folder.glob("*.safetensors"))


def test_safetensors_own_reader_reads_what_is_written(tmp_path: Path) -> None:
    (file,) = write(tmp_path, 10_000)
    loaded = load_file(file)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    (file,) = write(tmp_path, 10_000)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


def test_shards_stay_under_the_limit_unless_one_tensor_is_larger(tmp_path: Path) -> None:
    files = write(tmp_path, 10)
    assert [file.name for file in files] == [f"x-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_interrupted_write_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "config.json").write_text("{}")

    def write_half() -> None:
        with new_folder(old, force=True) as folder:
            (folder / "config.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (old / "config.json").read_text() == "{}"


def test_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "config.json").write_text("{}")
    rename = Path.rename

    def fails_for_new_folders(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError("no space")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_new_folders)
    with pytest.raises(OSError, match="no space"), new_folder(old, force=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (old / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (1000, 1000), ("12", 12), ("9kb", 9000)]
)
def test_sizes(size: str | int, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "big", "-1", "0", "5XB", "1.2.3"])
def test_sizes_that_mean_nothing(size: str) -> None:
    with pytest.raises(ConfigError, match="not understood"):
        parse_size(size)

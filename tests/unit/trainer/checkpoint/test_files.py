"""The files: safetensors that the library reads, digests that are those of the bytes, a manifest that guards itself."""

import hashlib
import json

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.checkpoint import files as checkpoint_files
from zeropipe.trainer.checkpoint.boxes import Box
from zeropipe.trainer.checkpoint.files import (
    CheckpointManifest,
    DamagedError,
    Digest,
    box_tensor,
    digest_problems,
    parse_key,
    write_bytes,
    write_rank,
)


def _boxes() -> dict[tuple[str, str, Box], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        ("master", "a.weight", Box((3, 0), (5, 7))): torch.randn(5, 7, generator=generator),
        ("exp_avg", "a.weight", Box((0, 2), (600, 900))): torch.randn(600, 900, generator=generator),  # hashed aside
        ("master", "norm/odd.bias", Box((11,), (3,))): torch.randn(3, generator=generator),
        ("master", "scalar", Box((), ())): torch.randn((), generator=generator),
    }


def test_the_library_reads_what_is_written_and_the_digest_is_that_of_the_file(tmp_path):
    boxes = _boxes()
    tensors = [box_tensor(*key, lambda tensor=tensor: tensor) for key, tensor in boxes.items()]
    shapes = {"a.weight": (600, 902), "norm/odd.bias": (14,), "scalar": ()}
    files = write_rank(tmp_path, 3, tensors, shapes)
    assert list(files) == ["rank-00003.safetensors"]
    path = tmp_path / "rank-00003.safetensors"
    assert files[path.name] == Digest(path.stat().st_size, xxhash.xxh3_128_hexdigest(path.read_bytes()))
    found = load_file(path)
    assert {parse_key(key) for key in found} == {(kind, name, box.offset) for kind, name, box in boxes}
    for written, tensor in zip(tensors, boxes.values(), strict=True):
        assert torch.equal(found[written.key], tensor)


def test_large_shares_are_split_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "_FILE_LIMIT", 200)
    box, shapes = Box((0,), (20,)), {f"p{n}": (20,) for n in range(5)}
    tensors = [box_tensor("master", f"p{n}", box, lambda n=n: torch.full((20,), float(n))) for n in range(5)]
    files = write_rank(tmp_path, 0, tensors, shapes)
    assert list(files) == ["rank-00000.safetensors", "rank-00000-1.safetensors", "rank-00000-2.safetensors"]
    found = {key: value for name in files for key, value in load_file(tmp_path / name).items()}
    assert [float(found[f"master/p{n}/0"][7]) for n in range(5)] == [0, 1, 2, 3, 4]


def _written(folder) -> CheckpointManifest:
    files = {name: write_bytes(folder / name, name.encode() * 9) for name in ("rank-00000.safetensors", "state.json")}
    manifest = CheckpointManifest(12, 3, files)
    manifest.write(folder)
    return manifest


def test_the_manifest_comes_back(tmp_path):
    manifest = _written(tmp_path)
    assert CheckpointManifest.read(tmp_path) == manifest
    assert manifest.rank_files == ["rank-00000.safetensors"]
    assert digest_problems(tmp_path, manifest.files) == []


def test_the_digest_is_the_one_that_its_name_says(tmp_path):
    """https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md: of nothing, seed 0, high half first."""
    assert write_bytes(tmp_path / "empty", b"") == Digest(0, "99aa06d3014798d86001c324468d497f")


def test_what_was_hashed_otherwise_is_verified_otherwise(tmp_path):
    """Format 1 knew SHA-256 alone, and did not say so."""
    content = b"weights"
    (tmp_path / "rank-00000.safetensors").write_bytes(content)
    files = {"rank-00000.safetensors": {"size": 7, "sha256": hashlib.sha256(content).hexdigest()}}
    body = {"format": 1, "step": 12, "sequence": 3, "files": files}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(body | {"self": own}))
    manifest = CheckpointManifest.read(tmp_path)
    assert (manifest.hash, manifest.milestone) == ("sha256", False)
    assert digest_problems(tmp_path, manifest.files, manifest.hash) == []
    (tmp_path / "rank-00000.safetensors").write_bytes(b"Weights")
    (problem,) = digest_problems(tmp_path, manifest.files, manifest.hash)
    assert f"sha256 is {hashlib.sha256(b'Weights').hexdigest()}" in problem
    manifest.write(tmp_path)
    assert CheckpointManifest.read(tmp_path) == manifest


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    manifest = _written(tmp_path)
    for name in ("rank-00000.safetensors", "state.json", "manifest.json"):
        path, whole = tmp_path / name, (tmp_path / name).read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            if name == "manifest.json":
                with pytest.raises(DamagedError, match="manifest"):
                    CheckpointManifest.read(tmp_path)
            else:
                assert digest_problems(tmp_path, manifest.files) == [
                    f"{path}: xxh3_128 is {xxhash.xxh3_128_hexdigest(bytes(damaged))}, "
                    f"the manifest says {manifest.files[name].value}"
                ]
        path.write_bytes(whole)


def test_missing_and_short_files_are_named_with_what_was_expected(tmp_path):
    manifest = _written(tmp_path)
    (tmp_path / "state.json").unlink()
    with (tmp_path / "rank-00000.safetensors").open("r+b") as file:
        file.truncate(5)
    assert digest_problems(tmp_path, manifest.files) == [
        f"{tmp_path}/rank-00000.safetensors: 5 bytes, the manifest says 198",
        f"{tmp_path}/state.json: missing",
    ]


def test_a_later_format_is_refused_and_not_called_damaged(tmp_path):
    _written(tmp_path)
    path = tmp_path / "manifest.json"
    body = json.loads(path.read_text())
    del body["self"]
    body["format"] = 3
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(body | {"self": digest}))
    with pytest.raises(
        UserError, match="format 3 is newer than this version of zeropipe reads \\(2\\): upgrade"
    ) as error:
        CheckpointManifest.read(tmp_path)
    assert not isinstance(error.value, DamagedError)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"format": 1}'])
def test_a_manifest_that_is_none(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedError, match="manifest"):
        CheckpointManifest.read(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere", "folder/file", "..", "", "/etc/passwd"])
def test_a_manifest_cannot_point_outside_of_its_folder(tmp_path, name):
    digest = write_bytes(tmp_path / "state.json", b"{}")
    CheckpointManifest(1, 1, {"state.json": digest, name: digest}).write(tmp_path)
    with pytest.raises(DamagedError, match=f"manifest.json: {name!r} is not the name of a file"):
        CheckpointManifest.read(tmp_path)

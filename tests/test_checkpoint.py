"""Checkpoints come back as they were, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.released import ReleasedDRSformer
from drsformer import checkpoint
from drsformer.config import EXPERTS, FEED_FORWARDS, BlockConfig, DRSformerConfig, LevelConfig, MEFCConfig, preset
from drsformer.model import DRSformer
from runtime.errors import InputError
from tests.support.networks import SMALL, fill, image


def odd_config(seed: int) -> DRSformerConfig:
    """A network such as a pruner might leave behind: every width its own."""
    r = random.Random(seed)

    def level(width: int) -> LevelConfig:
        return LevelConfig(
            width, tuple(BlockConfig(r.randint(1, 3), r.randint(1, 7), r.randint(1, 9)) for _ in range(r.randint(0, 2)))
        )

    def mefc() -> MEFCConfig | None:
        choices = (*EXPERTS, "none")
        return r.choice([None, MEFCConfig(r.randint(1, 9), tuple(tuple(r.sample(choices, 3)) for _ in range(2)))])

    w1, u1 = r.randint(1, 9), r.randint(1, 9)
    return DRSformerConfig(
        encoder=(level(w1), level(4 * r.randint(1, 3)), level(4 * r.randint(1, 3))),
        latent=level(4 * r.randint(1, 4)),
        decoder=(level(r.randint(1, 9)), level(r.randint(1, 9)), level(w1 + u1)),
        up=(r.randint(1, 9), r.randint(1, 9), u1),
        topk=r.choice([(), ("1/2",), ("1/3", "5/7", "1"), ("1/2", "2/3", "3/4", "4/5")]),
        feed_forward=r.choice(FEED_FORWARDS),
        mefc_early=mefc(),
        mefc_late=mefc(),
    )


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_round_trip_of_odd_networks(tmp_path, seed):
    model = fill(DRSformer(odd_config(seed)))
    checkpoint.save(tmp_path / "m.safetensors", model, {"trained_on": ["a/b"], "n": seed})
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert loaded.model.config == model.config
    assert loaded.provenance == {"trained_on": ["a/b"], "n": seed}
    assert not loaded.model.training
    assert torch.equal(loaded.model(image(16, 24)), model(image(16, 24)))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]  # nothing temporary is left


def test_provenance_goes_on_from_that_of_the_parent():
    model = DRSformer(preset("drsformer-tiny"))
    first = checkpoint.provenance_after(None, "a.b", {"x": 1}, trained_on=["d/e"], scores={"psnr": 30.0})
    assert first == {
        "trained_on": ["d/e"],
        "parent": None,
        "steps": [{"command": "a.b", "options": {"x": 1}}],
        "scores": {"psnr": 30.0},
    }
    second = checkpoint.provenance_after(checkpoint.Checkpoint(model, first, "0f"), "a.c", {})
    assert second == {
        "trained_on": ["d/e"],
        "parent": "0f",
        "steps": [*first["steps"], {"command": "a.c", "options": {}}],
    }
    authors = checkpoint.Checkpoint(model, {"source": "net.pth"}, "f0")
    steps = [{"command": "a.c", "options": {}}]
    assert checkpoint.provenance_after(authors, "a.c", {}) == {"trained_on": None, "parent": "f0", "steps": steps}


def test_same_content_gives_the_same_file(tmp_path):
    model = DRSformer(preset("drsformer-tiny"))
    for name in "ab":
        checkpoint.save(tmp_path / f"{name}.safetensors", model, {"x": 1})
    assert checkpoint.file_sha256(tmp_path / "a.safetensors") == checkpoint.file_sha256(tmp_path / "b.safetensors")


def test_half_precision_file_is_rounded_and_read_as_float32(tmp_path):
    model = fill(DRSformer(preset("drsformer-tiny")))
    checkpoint.save(tmp_path / "m.safetensors", model, {}, dtype=torch.float16)
    loaded = checkpoint.load(tmp_path / "m.safetensors").model
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float())


def test_loads_in_a_new_process_from_the_file_alone(tmp_path):
    checkpoint.save(tmp_path / "m.safetensors", fill(DRSformer(odd_config(3))), {})
    code = "import sys; from drsformer import checkpoint; print(checkpoint.load(sys.argv[1]).sha256)"
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "m.safetensors"], capture_output=True, text=True)
    assert run.stdout.strip() == checkpoint.file_sha256(tmp_path / "m.safetensors"), run.stderr


WRAPPERS = {
    "params": lambda state: {"params": state},
    "params_ema": lambda state: {"params_ema": state, "params": {}},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "bare": lambda state: state,
    "data parallel": lambda state: {"params": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("mefc", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_authors_format_in_every_wrapping(tmp_path, mefc, wrapper):
    state = ReleasedDRSformer(**SMALL, mefc=mefc).state_dict()
    torch.save(WRAPPERS[wrapper](state), tmp_path / "net.pth")
    loaded = checkpoint.load(tmp_path / "net.pth")
    assert loaded.model.config == DRSformerConfig.regular(**SMALL, mefc="both" if mefc else "none")
    assert loaded.provenance == {"source": "net.pth"}
    assert torch.equal(loaded.model.patch_embed.weight, state["patch_embed.proj.weight"])
    assert torch.equal(loaded.model.latent[1].attn.mix[3], state["latent.1.attn.attn4"])


@pytest.mark.parametrize("mefc", [True, False])
def test_full_size_shapes_give_the_presets(mefc):
    with torch.device("meta"):
        state = ReleasedDRSformer(mefc=mefc).state_dict()
    shapes = {checkpoint._rename(name): tuple(tensor.shape) for name, tensor in state.items()}
    assert checkpoint.config_from_shapes(shapes) == preset("drsformer" if mefc else "drsformer-nomefc")


@pytest.mark.parametrize("kind", FEED_FORWARDS)
@pytest.mark.parametrize("experts", [1, 4])
def test_config_of_the_ablations_is_recovered_from_shapes(kind, experts):
    config = DRSformerConfig.regular(
        width=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), feed_forward=kind, mefc="late", experts=experts
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in DRSformer(config).state_dict().items()}
    assert checkpoint.config_from_shapes(shapes) == config


class Evil:
    """Runs code when it is unpickled by a loader that runs code."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (Path.touch, (self.witness,))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    witness = tmp_path / "executed"
    torch.save({"params": Evil(witness)}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"params": Evil(witness)}))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(InputError, match="refused") as error:
            checkpoint.load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not witness.exists()
    pickle.loads((tmp_path / "old.pth").read_bytes())
    assert witness.exists()  # the attack itself works


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, suffix, kept):
    path = tmp_path / f"m{suffix}"
    if suffix == ".pth":
        torch.save({"params": ReleasedDRSformer(**SMALL).state_dict()}, path)
    else:
        checkpoint.save(path, DRSformer(preset("drsformer-tiny")), {})
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(InputError, match=r"damaged|begins with b''; was it downloaded in full\?"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"\xff\xd8\xff\xe0 a photograph", b""])
def test_what_is_no_checkpoint_is_not_said_to_hold_code(tmp_path, content):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(InputError, match="expected a PyTorch checkpoint, found a file that begins with") as error:
        checkpoint.load(tmp_path / "m.pth")
    assert "\n" not in str(error.value)


def changed(state: dict, how: str) -> dict:
    first = next(iter(state))
    if how == "missing":
        return {name: tensor for name, tensor in state.items() if name != first}
    if how == "unknown":
        return {**state, "latent.0.attn.extra": torch.zeros(1)}
    if how == "shape":
        return {**state, "decoder_level1.0.norm1.body.bias": torch.zeros(5)}
    if how == "dtype":
        return {**state, "decoder_level1.0.norm1.body.bias": torch.zeros(24, dtype=torch.int32)}
    return {**state, "decoder_level1.0.norm1.body.bias": torch.full((24,), float("nan"))}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "patch_embed"),
        ("unknown", "latent.0.attn.extra"),
        ("shape", r"\(24,\).*\(5,\)"),
        ("dtype", "int32"),
        ("nan", "finite"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, how, message):
    torch.save({"params": changed(ReleasedDRSformer(**SMALL).state_dict(), how)}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=message) as error:
        checkpoint.load(tmp_path / "net.pth")
    assert "\n" not in str(error.value)


def test_other_files_are_refused_in_one_line(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({"params": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("hello", "world")
    (tmp_path / "folder.pth").mkdir()
    for name in ("list.pth", "other.pth", "plain.safetensors", "notes.txt", "zip.pth", "folder.pth", "absent.pth"):
        with pytest.raises(InputError) as error:
            checkpoint.load(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def save_described(path: Path, model: DRSformer, **changes) -> None:
    """A checkpoint whose description differs from what belongs to it."""
    description = {"format": checkpoint.FORMAT, "config": model.config.to_dict(), "provenance": {}, **changes}
    save_file(dict(model.state_dict()), path, {checkpoint.METADATA_KEY: json.dumps(description)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"format": 2}, "expected format 1, found 2"), ({"config": {}}, "metadata"), ({"config": "{]"}, "metadata")],
)
def test_damaged_metadata_is_refused(tmp_path, changes, message):
    model = DRSformer(preset("drsformer-tiny"))
    save_described(tmp_path / "good.safetensors", model)
    checkpoint.load(tmp_path / "good.safetensors")
    save_described(tmp_path / "bad.safetensors", model, **changes)
    with pytest.raises(InputError, match=message):
        checkpoint.load(tmp_path / "bad.safetensors")


def test_config_that_does_not_fit_its_tensors_is_refused(tmp_path):
    model = DRSformer(preset("drsformer-tiny"))
    other = dataclasses.replace(model.config, feed_forward="gdfn")
    save_described(tmp_path / "m.safetensors", model, config=other.to_dict())
    with pytest.raises(InputError, match=r"missing.*unknown"):
        checkpoint.load(tmp_path / "m.safetensors")


def test_hostile_shapes_are_told_in_one_line(tmp_path):
    """Sizes that would divide by zero or fill the memory, and a parameter under two names."""
    state = ReleasedDRSformer(**SMALL).state_dict()
    torch.save({**state, "latent.0.attn.temperature": torch.zeros(0, 1, 1)}, tmp_path / "a.pth")
    torch.save({**state, "module.latent.0.attn.temperature": torch.zeros(4, 1, 1)}, tmp_path / "b.pth")
    model = DRSformer(preset("drsformer-tiny"))
    huge = model.config.to_dict()
    huge["latent"]["width"] = 4 * 10**12
    save_described(tmp_path / "c.safetensors", model, config=huge)
    save_described(tmp_path / "d.safetensors", model, provenance=[1])
    for name in ("a.pth", "b.pth", "c.safetensors", "d.safetensors"):
        with pytest.raises(InputError, match=name) as error:
            checkpoint.load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_failed_save_leaves_the_old_file(tmp_path):
    """The limit on the size of a file stands in for a full disk."""
    path = tmp_path / "m.safetensors"
    checkpoint.save(path, DRSformer(preset("drsformer-tiny")), {})
    before = path.read_bytes()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            checkpoint.save(path, DRSformer(preset("drsformer-tiny")), {"new": True})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises(InputError, match=r"\.safetensors"):
        checkpoint.save(tmp_path / "m.pth", DRSformer(preset("drsformer-tiny")), {})

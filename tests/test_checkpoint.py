"""Checkpoints come back as they were, and nothing else gets in."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import fractions
import functools
import json
import operator
import os
import pickle
import random
import re
import resource
import runpy
import subprocess
import sys
import types
import uuid
import zipfile
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from lightning_fabric.utilities.data import AttributeDict
from safetensors.torch import save_file
from torch import nn

from benchmarks.released import ReleasedDRSformer
from drsformer import checkpoint, unpickling
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
    checkpoint.save(tmp_path / "m.safetensors", model, {"trained_on": ["a/b", "c", "a/b"], "n": seed})
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert loaded.model.config == model.config
    assert loaded.provenance == {"trained_on": ["a/b", "c", "a/b"], "n": seed}
    assert loaded.origin == "trained on a/b, c"
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


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPERS = {
    **{key: lambda state, key=key: {key: state} for key in checkpoint.WRAPPERS},
    "params_ema beside none": lambda state: {"params_ema": state, "params": {}},
    "beside others": lambda state: {
        "state_dict": state, "epoch": 3, "discriminator": {"conv.weight": torch.zeros(3)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 3e-4}]},
    },
    "bare": lambda state: state,
    "bare, beside others": lambda state: {**state, "epoch": 3, "name": "net"},
    "two keys": lambda state: {"model": {"state_dict": state}},
    "a key of one's own": lambda state: {"netG_A": state},
    **{
        f"prefix {prefix}": lambda state, prefix=prefix: {"params": prefixed(state, prefix)}
        for prefix in ("module.", "_orig_mod.", "net_g.", "model.", "generator.", "module.module.",
                       "module._orig_mod.net_g.", "model.generator._orig_mod.", "trainer.my_net.")
    },
    "compiled by blocks": lambda state: {
        re.sub(r"^(latent\.\d|encoder_level1\.0)\.", r"\1._orig_mod.", name): value for name, value in state.items()
    },
}  # fmt: skip


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


def two_networks() -> tuple[dict, dict]:
    """The same with and without averaging, as in the authors' training."""
    state = fill(ReleasedDRSformer(**SMALL, mefc=False)).state_dict()
    return state, {name: 2 * tensor for name, tensor in state.items()}


@pytest.mark.parametrize("first", ["params", "params_ema"])
def test_the_authors_weights_are_taken_and_others_on_demand(tmp_path, caplog, first):
    both = dict(zip(("params", "params_ema"), two_networks(), strict=True))
    torch.save({first: both[first], **both}, tmp_path / "net.pth")
    assert torch.equal(checkpoint.load(tmp_path / "net.pth").model.output.weight, both["params"]["output.weight"])
    assert caplog.messages == [f"{tmp_path / 'net.pth'}: holds params and params_ema; params is taken"]
    caplog.clear()
    for key in both:
        loaded = checkpoint.load(tmp_path / "net.pth", weights_key=key)
        assert torch.equal(loaded.model.output.weight, both[key]["output.weight"])
    assert not caplog.messages
    with pytest.raises(InputError, match=r"^`weights_key`: .*net\.pth holds weights, params, params_ema, found 'ema'"):
        checkpoint.load(tmp_path / "net.pth", weights_key="ema")


def test_one_network_has_nothing_to_choose_from(tmp_path):
    checkpoint.save(tmp_path / "m.safetensors", DRSformer(preset("drsformer-tiny")), {})
    with pytest.raises(InputError, match=r"`weights_key`: .* one network only"):
        checkpoint.load(tmp_path / "m.safetensors", weights_key="params_ema")
    torch.save(two_networks()[0], tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"`weights_key`: .* the file itself, found 'params_ema'"):
        checkpoint.load(tmp_path / "net.pth", weights_key="params_ema")


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pth.tar", "a.PTH", "a.pt", "a", "a.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_content_decides_and_not_the_suffix(tmp_path, name, zipped):
    state, _ = two_networks()
    torch.save({"params": state}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert torch.equal(checkpoint.load(tmp_path / name).model.output.weight, state["output.weight"])


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.SAFETENSORS"])
def test_our_files_under_other_names(tmp_path, name):
    model = fill(DRSformer(odd_config(3)))
    checkpoint.save(tmp_path / "a.safetensors", model, {"x": 1})
    (tmp_path / "a.safetensors").rename(tmp_path / name)
    loaded = checkpoint.load(tmp_path / name)
    assert (loaded.model.config, loaded.provenance) == (model.config, {"x": 1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_others(tmp_path, dtype, metadata):
    state = {name: tensor.to(dtype) for name, tensor in two_networks()[0].items()}
    save_file(prefixed(state, "module."), tmp_path / "net.safetensors", metadata)
    torch.save(state, tmp_path / "net.pth")
    for name in ("net.safetensors", "net.pth"):
        loaded = checkpoint.load(tmp_path / name)
        assert loaded.provenance == {"source": name}
        assert loaded.model.output.weight.dtype == torch.float32
        assert torch.equal(loaded.model.output.weight, state["output.weight"].float())


def test_what_a_profiler_leaves_is_dropped_and_said(tmp_path, caplog):
    state = two_networks()[0]
    left = {f"{module}{what}": torch.zeros(1, dtype=torch.float64) for what in ("total_ops", "total_params")
            for module in ("", "latent.0.", "latent.0.attn.")}  # fmt: skip
    torch.save({"params": prefixed({**state, **left}, "module.")}, tmp_path / "net.pth")
    loaded = checkpoint.load(tmp_path / "net.pth")
    assert torch.equal(loaded.model.output.weight, state["output.weight"])
    [remark] = caplog.messages
    assert remark.endswith("tensors of no part of the network are dropped: total_ops, total_params")


def test_average_of_weights(tmp_path, caplog):
    """PyTorch's own, which counts beside the network how many were averaged."""
    averaged = torch.optim.swa_utils.AveragedModel(ReleasedDRSformer(**SMALL, mefc=False))
    torch.save(averaged.state_dict(), tmp_path / "net.pth")
    checkpoint.load(tmp_path / "net.pth")
    assert "n_averaged" in caplog.text


def test_dense_attention_is_said(tmp_path, caplog):
    state = {name: tensor for name, tensor in two_networks()[0].items() if ".attn.attn" not in name}
    torch.save(state, tmp_path / "net.pth")
    assert checkpoint.load(tmp_path / "net.pth").model.config.topk == ()
    assert "without tensors attn1 to attn4, so its attention is taken for dense" in caplog.text


def harmless() -> dict:
    """What training scripts keep beside the weights."""
    by_default = collections.defaultdict(list)
    by_default["loss"].append(np.float64(0.5))
    return {
        "best_psnr": np.float64(33.5), "step": np.int64(7), "flag": np.bool_(True), "half": np.float16(2),
        "curve": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "b"]), "odd": np.array([{"a": 1}, None]),
        "record": np.zeros(2, [("a", "f4"), ("b", "i8")]), "dtype": np.dtype("f4"), "type": np.float32,
        "rng": np.random.RandomState(0), "rng_state": np.random.get_state(), "generator": np.random.default_rng(0),
        "python_rng": random.getstate(), "cuda_rng": [torch.get_rng_state()],
        "saved": datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC), "day": datetime.date(2024, 5, 1),
        "took": datetime.timedelta(hours=3), "time": datetime.time(3, 4),
        "root": Path("data/train"), "windows": PureWindowsPath("C:/data"), "id": uuid.UUID(int=7),
        "args": argparse.Namespace(lr=np.float32(3e-4), data=Path("x"), betas=(0.9, 0.999)),
        "namespace": types.SimpleNamespace(a=1, nested=types.SimpleNamespace(b={1, 2})),
        "history": by_default, "factory": collections.defaultdict(dict, a=1),
        "ordered": collections.OrderedDict(a=1), "counted": collections.Counter("aab"),
        "recent": collections.deque([1.0, 2.0], maxlen=5), "set": {1}, "frozen": frozenset([1]),
        "price": decimal.Decimal("1.5"), "ratio": fractions.Fraction(2, 3), "number": 1j, "raw": b"\xff\0",
        "bytes": bytearray(b"x"), "slice": slice(1, 2), "range": range(3), "huge": 2**80, "none": None,
        "torch": torch.__version__, "size": torch.Size([1, 2]), "device": torch.device("cuda:0"), "kind": int,
        "dtype_of_torch": torch.float16, "hyper_parameters": AttributeDict(lr=1, more=AttributeDict(a=np.float64(1))),
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", [None, *harmless()])
def test_harmless_values_beside_the_tensors(tmp_path, caplog, key, zipped):
    state = two_networks()[0]
    values = harmless() if key is None else {key: harmless()[key]}
    torch.save({**values, "state_dict": state}, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    loaded = checkpoint.load(tmp_path / "net.pth")
    assert torch.equal(loaded.model.output.weight, state["output.weight"])
    assert not caplog.messages


def test_tensors_in_a_default_dictionary(tmp_path):
    state = two_networks()[0]
    torch.save({"params": collections.defaultdict(list, state)}, tmp_path / "net.pth")
    assert torch.equal(checkpoint.load(tmp_path / "net.pth").model.output.weight, state["output.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"params": {"conv_first.weight": torch.zeros(3), "body.0.bias": torch.zeros(3)}},
         r"found 2 others, such as params\.conv_first\.weight"),
        ({"epoch": 3}, "found none"),
        ([{"a": 1}], "found none"),
        (torch.zeros(3), "found none"),
        ({**two_networks()[0], "refinement.0.norm1.body.weight": torch.zeros(24)},
         r"1 unknown \(such as refinement\.0\.norm1\.body\.weight\)"),
        (prefixed({**two_networks()[0], "vgg.conv1.weight": torch.zeros(3)}, "module.net_g."),
         r"1 unknown \(such as module\.net_g\.vgg\.conv1\.weight\)"),
    ],
)  # fmt: skip
def test_foreign_networks_are_refused_by_name(tmp_path, content, message):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(InputError, match=message) as error:
        checkpoint.load(tmp_path / "net.pth")
    assert "\n" not in str(error.value)


def test_tensors_without_values_are_no_weights(tmp_path):
    state = two_networks()[0]
    for name, tensor in {
        "meta": torch.zeros(3, device="meta"),
        "sparse": torch.zeros(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    }.items():
        torch.save({**state, "output.weight": tensor}, tmp_path / f"{name}.pth")
        with pytest.raises(InputError, match=r"1 missing \(such as output\.weight\)"):
            checkpoint.load(tmp_path / f"{name}.pth")


def test_tensors_that_share_their_values_are_no_weights(tmp_path):
    """A few numbers can be the view of any shape, and 16 kB ask for any memory. Views of a whole vector are sound."""
    state = two_networks()[0]
    torch.save({name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}, tmp_path / "one.pth")
    largest = max(tensor.numel() for tensor in state.values())
    shared = torch.zeros(largest)
    views = {name: shared[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}
    torch.save(views, tmp_path / "shared.pth")
    for name in ("one", "shared"):
        with pytest.raises(InputError, match="expected tensors with values of their own, found"):
            checkpoint.load(tmp_path / f"{name}.pth")
    whole = torch.cat([tensor.flatten() for tensor in state.values()])
    pieces = whole.split([tensor.numel() for tensor in state.values()])
    views = {name: piece.view(state[name].shape) for name, piece in zip(state, pieces, strict=True)}
    torch.save(views, tmp_path / "views.pth")
    checkpoint.load(tmp_path / "views.pth")


def test_content_that_holds_itself(tmp_path):
    content = {"a": {}}
    content["a"]["b"] = content
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(InputError, match="found none"):
        checkpoint.load(tmp_path / "net.pth")


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


class Call:
    """Calls `function` when it is unpickled by a loader that runs code."""

    def __init__(self, function, *args) -> None:
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self) -> None:
        """To be taken for a function itself."""


def touch(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


ATTACKS = {  # by the name that the pickle has for the function, which can be that of Python 2
    "posix.system": lambda path: Call(os.system, f"touch {path}"),
    "commands.Popen": lambda path: Call(subprocess.Popen, ["touch", str(path)]),
    "eval": lambda path: Call(eval, touch(path)),
    "exec": lambda path: Call(exec, touch(path)),
    "getattr": lambda path: Call(getattr, path, "touch"),
    "__import__": lambda path: Call(__import__, "antigravity"),
    "io.open": lambda path: Call(open, str(path), "w"),
    "functools.partial": lambda path: Call(functools.partial, exec, touch(path)),
    "operator.methodcaller": lambda path: Call(Call(operator.methodcaller, "touch"), path),
    "pickle.loads": lambda path: Call(pickle.loads, pickle.dumps(Call(exec, touch(path)))),
    "runpy.run_path": lambda path: Call(runpy.run_path, str(path)),
    "numpy.load": lambda path: Call(np.load, str(path), None, True),
    "torch.serialization.load": lambda path: Call(torch.load, str(path)),
    "torch.storage._load_from_bytes": lambda path: Call(torch.storage._load_from_bytes, path.name.encode()),
    "torch.jit._serialization.load": lambda path: Call(torch.jit.load, str(path)),
    "torch.hub.load": lambda path: Call(torch.hub.load, str(path), "net"),
    "benchmarks.released.ReleasedDRSformer": lambda path: ReleasedDRSformer(**SMALL, mefc=False),
}

PLACES = {
    "alone": lambda attack: attack,
    "for the state": lambda attack: {"params": attack},
    "in the state": lambda attack: {"params": {**two_networks()[0], "latent.0.attn.attn1": attack}},
    "beside the state": lambda attack: {**two_networks()[0], "more": [{"epoch": (3, attack)}]},
    "as a key": lambda attack: {"params": two_networks()[0], "more": [(attack, 3)]},
    "as an attribute": lambda attack: {"params": two_networks()[0], "args": argparse.Namespace(a=attack)},
    "as a part of an array": lambda attack: {"params": two_networks()[0], "curve": np.array([attack, None])},
    "as a factory": lambda attack: {"params": two_networks()[0], "a": Call(collections.defaultdict, attack)},
    "as an argument": lambda attack: {"params": two_networks()[0], "date": Call(datetime.date, attack)},
    "as a function": lambda attack: {"params": two_networks()[0], "a": Call(attack, "x")},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "place"), [*((name, "beside the state") for name in ATTACKS), *(("exec", place) for place in PLACES)]
)
def test_pickled_code_is_refused_by_name_and_not_run(tmp_path, name, place, zipped):
    content = PLACES[place](ATTACKS[name](tmp_path / "executed"))
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        InputError, match=rf"refused: it holds pickled code, which would run {re.escape(name)};"
    ) as error:
        checkpoint.load(tmp_path / "net.pth")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["posix.system", "exec", "io.open"])
def test_plain_pickles_are_refused_by_name_and_not_run(tmp_path, name, protocol):
    """The attacks themselves work."""
    (tmp_path / "net.pth").write_bytes(pickle.dumps({"params": ATTACKS[name](tmp_path / "executed")}, protocol))
    torch.save({"params": ATTACKS[name](tmp_path / "executed")}, tmp_path / "zip.pth", pickle_protocol=protocol)
    for path in ("net.pth", "zip.pth")[protocol < 2 :]:  # the oldest protocols begin with no mark of a pickle
        with pytest.raises(
            InputError, match=rf"refused: .* would run (__builtin__\.|builtins\.)?{re.escape(name)};"
        ) as error:
            checkpoint.load(tmp_path / path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "net.pth").read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cdatetime\ndatetime.__class__\n",
        b"cdatetime\ndatetime\n}X\x03\x00\x00\x00newK\x01sb",  # changes the class that stands for it
        b"cargparse\nNamespace\n)\x81(K\x01K\x02u",  # takes it for a dictionary
        b"cpathlib\nPosixPath.touch\n(X\x08\x00\x00\x00executedtR",
        b"cdrsformer.unpickling\nread\n",
        b"cbuiltins\ndict.fromkeys\n",
    ],
)
def test_stand_ins_lead_nowhere(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    before = dict(vars(unpickling.Forgotten))
    with zipfile.ZipFile("net.pth", "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("net/version", b"3\n")
    with pytest.raises(InputError, match=r"net\.pth: refused: it holds pickled code"):
        checkpoint.load("net.pth")
    assert dict(vars(unpickling.Forgotten)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_a_program_in_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Conv2d(1, 1, 1)).save(str(tmp_path / "net.pth"))
    with pytest.raises(InputError, match="refused: it is a program in TorchScript"):
        checkpoint.load(tmp_path / "net.pth")


def test_stand_ins_are_for_the_moment(tmp_path):
    """Other code of the process that reads checkpoints is not to meet them."""
    torch.save({"date": datetime.date(2024, 5, 1), **two_networks()[0]}, tmp_path / "net.pth")
    checkpoint.load(tmp_path / "net.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"datetime\.date"):
        torch.load(tmp_path / "net.pth", weights_only=True)


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
    with pytest.raises(
        InputError, match=r"expected a checkpoint of safetensors or torch.save, found .* and begins with"
    ) as error:
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
    [
        ({"format": 2}, "expected format 1, found 2"),
        ({"config": {}}, "metadata"),
        ({"config": "{]"}, "metadata"),
        ({"provenance": {"trained_on": "rain"}}, "metadata"),
        ({"provenance": {"trained_on": [5]}}, "metadata"),
        ({"provenance": {"steps": None}}, "metadata"),
    ],
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

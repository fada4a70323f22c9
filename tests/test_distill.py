"""Distillation: what each term compares, exact resumption with what the loss learns, and mistakes told in one line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from compress.distill import DistillOptions, command, distill
from compress.distillation import (
    STREAMS,
    BlockwiseDistillation,
    Distillation,
    PatchesOfPhotographs,
    stream_errors,
    stream_maps,
    tap_streams,
)
from compress.groups import remove
from compress.options import LossWeights
from drsformer import checkpoint
from drsformer.config import DRSformerConfig
from drsformer.data import dataset_name, find_pairs
from drsformer.evaluation import evaluate_model
from drsformer.loop import compile_blocks
from drsformer.model import DRSformer
from drsformer.recipe import DataOptions, Hardware, Recipe, Schedule
from export.folding import trainable
from runtime.cli import main
from runtime.errors import InputError
from runtime.pixels import to_image
from tests.support.networks import fill, image

CPU = Hardware(accelerator="cpu", devices="1")
ALL = LossWeights(1.0, 1.0, 0.1, 0.1, 0.1)
SHALLOW = {"depths": (0, 0, 0, 1)}
ROOT = Path(__file__).parents[1]


def network(width: int = 8, **changes) -> DRSformer:
    """Heads of `width` channels; `fill` gives all of one width the same weights."""
    options = {"depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4), "expansion": 1.0, "mefc": "none", **changes}
    return fill(DRSformer(DRSformerConfig.regular(width=width, **options)))


@pytest.fixture
def data(tmp_path) -> Path:
    """Three pairs of a grey gradient with white bars on it."""
    rng = np.random.default_rng(0)
    for i in range(3):
        clean = np.broadcast_to(np.linspace(0, 150, 24)[:, None, None], (24, 20, 3)).astype(np.uint8)
        rainy = clean + (rng.random((1, 20, 1)) < 0.2) * np.uint8(80)
        for kind, picture in (("input", rainy), ("target", clean)):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "data" / kind / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def teacher(tmp_path) -> Path:
    checkpoint.save(tmp_path / "teacher.safetensors", network(), {"trained_on": ["x"]})
    return tmp_path / "teacher.safetensors"


@pytest.fixture
def shallow(tmp_path) -> tuple[Path, str]:
    """A teacher and a student half as wide, of one block each."""
    for name, width in (("tutor", 8), ("student", 4)):
        checkpoint.save(tmp_path / f"{name}.safetensors", network(width, **SHALLOW), {"steps": [{"command": name}]})
    return tmp_path / "tutor.safetensors", str(tmp_path / "student.safetensors")


def terms_of(
    weights: LossWeights, student: DRSformer, clean: Tensor, teacher: DRSformer | None = None
) -> dict[str, float]:
    loss = Distillation(trainable(teacher or network()), student, weights)
    return {name: term.item() for name, term in loss(trainable(student), image(16, 16), clean).items()}


def test_a_copy_of_the_teacher_differs_from_it_in_nothing():
    clean = image(16, 16, seed=1)
    terms = terms_of(ALL, network(), clean)
    assert terms.pop("l1") == pytest.approx((network()(image(16, 16)) - clean).abs().mean().item(), rel=1e-5)
    assert terms == {"l1_teacher": 0, "features": 0, "attention": 0, "frequency": 0}


def test_terms_are_what_their_sources_say():
    """Against the readable networks, and with every weight 2."""
    teacher, student, rainy = network(), network(), image(16, 16)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    seen = {}
    for name, model in (("teacher", teacher), ("student", student)):
        model.latent.register_forward_hook(lambda m, i, out, name=name: seen.update({(name, "f"): out}))
        model.decoder_level2[-1].attn.topk.register_forward_pre_hook(lambda m, i, n=name: seen.update({(n, "a"): i[0]}))
        seen[name] = model(rainy)
    difference = seen["student"] - seen["teacher"]
    own, theirs = seen["student", "f"], seen["teacher", "f"]
    spectrum = np.fft.rfft2(difference.detach().double().numpy(), norm="ortho")
    expected = {
        "l1_teacher": difference.abs().mean().item(),
        "features": (((own - theirs) ** 2).mean() / (theirs**2).mean()).item(),
        "attention": ((seen["student", "a"] - seen["teacher", "a"]) ** 2).mean().item(),
        "frequency": (np.abs(spectrum.real).mean() + np.abs(spectrum.imag).mean()) / 2,
    }
    terms = terms_of(LossWeights(0, 2, 2, 2, 2, ["decoder_level2"]), student, rainy, teacher)
    assert terms == pytest.approx({name: 2 * value for name, value in expected.items()}, rel=1e-3)
    assert min(terms.values()) > 1e-6


def test_patches_without_a_clean_version_count_in_all_terms_but_l1():
    student, clean = network(4), torch.full((1, 3, 16, 16), torch.nan)
    terms = terms_of(LossWeights(1.0, 1.0, 0.0, 0.0, 0.1), student, clean)
    assert terms["l1"] == 0
    assert terms["l1_teacher"] > 0
    assert terms["frequency"] > 0
    loss = Distillation(trainable(network()), student, LossWeights())
    pair = torch.cat([image(16, 16), image(16, 16, seed=1)])
    loss(trainable(student), pair, torch.cat([image(16, 16, seed=2), clean]))["l1"].backward()
    alone, half = network(4), student.output.weight.grad
    (0.5 * (alone(image(16, 16)) - image(16, 16, seed=2)).abs().mean()).backward()
    assert torch.allclose(half, alone.output.weight.grad, atol=1e-5)


def test_loss_holds_only_what_it_learns():
    """The adapter where widths differ at the bottleneck; never the teacher, which gets no gradients either."""
    teacher, narrow = trainable(network()), network(4)
    loss = Distillation(teacher, narrow, LossWeights(features=1.0))
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {"adapter.weight": (64, 32, 1, 1)}
    sum(loss(trainable(narrow), image(16, 16), image(16, 16)).values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in (*narrow.parameters(), *loss.parameters()))
    for student, terms in ((narrow, LossWeights()), (network(), LossWeights(features=1.0))):
        assert not list(Distillation(trainable(network()), student, terms).parameters())


@pytest.mark.parametrize(
    ("student", "levels", "found"),
    [
        (dict(width=4), ["latent"], r"4 of 8 channels in the student and 4 of 16 channels in the teacher"),
        (dict(heads=(1, 2, 4, 4)), ["latent", "encoder_level3"], r"in encoder_level3, found 4 of 8 .* and 2 of 16"),
        (dict(topk=()), ["latent"], r"none in the student"),
        (dict(depths=(1, 1, 1, 0)), ["latent"], r"none in the student"),
    ],
)
def test_attention_of_other_heads_is_refused(student, levels, found):
    with pytest.raises(InputError, match=found) as error:
        Distillation(trainable(network()), network(**student), dataclasses.replace(ALL, attention_levels=levels))
    assert "\n" not in str(error.value)


def go(output: Path, teacher: Path, student: str, data: Path, iterations: int = 6, **changes):
    recipe = Recipe(iterations=iterations, batch=2, patch=16, ema=0.5, constant=0, **changes.pop("recipe", {}))
    options = {
        "schedule": Schedule(100, 1, 0),
        "hardware": CPU,
        "loss_weights": LossWeights(1, 1, 0.1, 0, 0.1),
        **changes,
    }
    return distill(DistillOptions(output, teacher, student, [data], recipe=recipe, **options))


def test_student_comes_closer_and_says_where_it_comes_from(data, shallow, tmp_path):
    scores = go(
        tmp_path / "run",
        *shallow,
        data,
        30,
        recipe={"lr": 3e-3, "clip": 1.0},
        data_options=DataOptions([data], protocol="did"),
        loss_weights=LossWeights(0.1, 1, 0.1, 0, 0.1),
    )
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for name in ("l1_teacher", "features", "frequency"):
        values = [line[name] for line in log if name in line]
        assert np.mean(values[-5:]) < 0.8 * np.mean(values[:3]), name
    student = checkpoint.load(tmp_path / "run" / "last.safetensors")
    assert {**student.provenance["scores"], "iteration": 30, "finished": True} == scores
    psnr, other = (evaluate_model(student.model, find_pairs(data), protocol).psnr for protocol in ("did", "rain200"))
    assert scores[f"{dataset_name(data)} psnr"] == pytest.approx(psnr, abs=1e-6)
    assert abs(psnr - other) > 1e-4
    _, step = student.provenance["steps"]
    assert step["command"] == "compress.distill"
    assert step["options"]["teacher"] == checkpoint.file_sha256(shallow[0])
    assert (step["options"]["l1"], step["options"]["attention_levels"]) == (0.1, ["latent"])
    assert not any("adapter" in name for name in student.model.state_dict())


def test_stopped_run_continues_exactly_with_its_adapter(data, shallow, tmp_path):
    """And the student may be a checkpoint, whose history goes on."""
    files = *shallow, data
    go(tmp_path / "whole", *files)
    result = go(tmp_path / "parts", *files, schedule=Schedule(minutes=0))
    assert (result["iteration"], result["finished"]) == (1, False)
    assert go(tmp_path / "parts", *files)["finished"]
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert list(whole["loss"]) == ["adapter.weight"]
    assert torch.equal(whole["loss"]["adapter.weight"], parts["loss"]["adapter.weight"])
    fresh = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["optimizer"]["param_groups"][0]["params"]
    assert len(fresh) == len(list(network(4, **SHALLOW).parameters())) + 1
    files = [(tmp_path / name / "last.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    student = checkpoint.load(tmp_path / "whole" / "last.safetensors")
    assert [step["command"] for step in student.provenance["steps"]] == ["student", "compress.distill"]
    assert student.provenance["parent"] == checkpoint.file_sha256(tmp_path / "student.safetensors")


def errors_of_streams(
    teacher: DRSformer, student: DRSformer, maps: dict[str, Tensor], rainy: Tensor
) -> dict[str, float]:
    """By level, on one image."""
    with torch.no_grad():
        seen = [(tap_streams(model), model(rainy))[0] for model in (trainable(teacher), trainable(student))]
    return {name: error.item() for name, error in stream_errors(*seen, maps).items()}


def blockwise(teacher: DRSformer, student: DRSformer, steps: int = 1) -> BlockwiseDistillation:
    maps = stream_maps(teacher, student, [image(16, 16, seed) for seed in range(4)])
    return BlockwiseDistillation(trainable(teacher), student, LossWeights(1, 1, 0.1), steps, maps)


def test_a_level_that_is_all_zero_has_a_map():
    teacher, narrow = network(), network(4)
    for parameter in narrow.parameters():
        torch.nn.init.zeros_(parameter)
    maps = stream_maps(teacher, narrow, [image(16, 16)])
    assert maps
    assert all(each.isfinite().all() for each in maps.values())


def test_a_level_of_the_teacher_that_is_all_zero_has_a_finite_error():
    teacher, student = network(), network()
    torch.nn.init.zeros_(teacher.down3_4.conv.weight)
    for block in teacher.latent:
        torch.nn.init.zeros_(block.attn.project_out.weight)
        torch.nn.init.zeros_(block.ffn.project_out.weight)
    terms = blockwise(teacher, student)(student, image(16, 16), image(16, 16, 1))
    assert all(term.isfinite() for term in terms.values())
    stream = torch.full((1, 2, 4, 4), 3.0)
    assert float(stream_errors({"latent": torch.zeros_like(stream)}, {"latent": stream}, {})["latent"]) == 9


@torch.no_grad()
def test_streams_are_compared_by_the_map_that_fits_best():
    """Where widths are equal, as they are: not even a rotation is made up for."""
    teacher, student, narrow = network(), network(), network(4)
    for i, parameter in enumerate(student.parameters()):
        parameter.mul_(1 + 0.02 * (i % 5))
    images = [image(16, 16, seed) for seed in range(4)]
    assert stream_maps(teacher, student, images) == {}
    seen, own = {}, {}
    for model, into in ((teacher, seen), (student, own)):
        model.decoder_level3.register_forward_hook(lambda m, i, out, into=into: into.update(out=out))
    rainy = image(16, 16, 9)
    teacher(rainy), student(rainy)
    expected = ((own["out"] - seen["out"]) ** 2).mean() / (seen["out"] ** 2).mean()
    assert expected > 1e-4
    assert errors_of_streams(teacher, student, {}, rainy)["decoder_level3"] == pytest.approx(expected.item(), rel=1e-3)
    maps = stream_maps(teacher, narrow, images)
    widths = {name: (teacher.config.levels()[name].width, narrow.config.levels()[name].width) for name in STREAMS}
    assert {name: tuple(each.shape) for name, each in maps.items()} == widths
    total = {name: sum(errors_of_streams(teacher, narrow, maps, each)[name] for each in images) for name in STREAMS}
    for name in STREAMS:
        for factor in (0.9, 1.1):
            other = maps | {name: factor * maps[name]}
            assert sum(errors_of_streams(teacher, narrow, other, each)[name] for each in images) > total[name]


def test_each_level_learns_from_its_own_stream_alone():
    """And the last level from the image; behind the first steps all of them learn from the image, as without."""
    teacher, student, clean = network(), network(4), image(16, 16, 1)
    loss, form = blockwise(teacher, student), trainable(student)
    terms = loss(form, image(16, 16), clean)
    assert list(terms) == ["l1", "l1_teacher", "features", *STREAMS]
    for name, term in terms.items():
        found = torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
        reached = {
            key.split(".")[0]
            for (key, _), each in zip(student.named_parameters(), found, strict=True)
            if each is not None
        }
        level = {"l1": "decoder_level1", "l1_teacher": "decoder_level1", "features": None}.get(name, name)
        assert reached & set(student.config.levels()) == ({level} if level else set()), name
    every = torch.autograd.grad(sum(terms.values()), list(student.parameters()), allow_unused=True)
    assert all(each is not None for each in every)
    after, plain = loss(form, image(16, 16), clean), Distillation(trainable(teacher), student, LossWeights(1, 1, 0.1))
    loss_of_image = plain(trainable(student), image(16, 16), clean)
    assert list(after) == list(loss_of_image) == ["l1", "l1_teacher", "features"]
    (slope,) = torch.autograd.grad(after["l1"], [student.patch_embed.weight])
    (expected,) = torch.autograd.grad(loss_of_image["l1"], [student.patch_embed.weight])
    assert torch.allclose(slope, expected, atol=1e-6)


def test_blockwise_steps_bring_streams_closer_and_leave_a_network(tmp_path):
    """On an image that is not trained on, and in a run that was stopped among these steps."""
    for i in range(6):
        for folder in ("input", "target"):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(to_image(image(40, 48, seed=i).numpy())).save(tmp_path / "data" / folder / f"{i}.png")
    teacher = network(expansion=2.0)
    student = remove(teacher, {f"{level}.0.ffn": [[0, 2], [1, 3]] for level in ("encoder_level1", "encoder_level3")})
    for name, model in (("teacher", teacher), ("student", student)):
        checkpoint.save(tmp_path / f"{name}.safetensors", model, {})
    files = tmp_path / "teacher.safetensors", str(tmp_path / "student.safetensors"), tmp_path / "data"
    how = {"blockwise": 30, "recipe": {"lr": 3e-3, "clip": 1.0}}
    go(tmp_path / "whole", *files, 32, **how)
    assert not go(tmp_path / "parts", *files, 32, schedule=Schedule(minutes=0), **how)["finished"]
    assert go(tmp_path / "parts", *files, 32, **how)["finished"]
    made = [(tmp_path / name / "last.safetensors").read_bytes() for name in ("whole", "parts")]
    assert made[0] == made[1]
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert ["latent" in line for line in log if "l1" in line] == [True] * 30 + [False] * 2
    trained = checkpoint.load(tmp_path / "whole" / "last.safetensors")
    assert trained.model.config == student.config
    assert trained.provenance["steps"][-1]["options"]["blockwise"] == 30
    unseen = image(40, 48, seed=50)
    before, after = (errors_of_streams(teacher, each, {}, unseen) for each in (student, trained.model))
    assert all(after[name] < 0.8 * before[name] for name in before), (before, after)


def test_run_is_not_continued_with_another_teacher_or_other_terms(data, teacher, tmp_path):
    go(tmp_path / "run", teacher, "drsformer-tiny", data, 1)
    with pytest.raises(InputError, match=r"l1_teacher=1, not 2"):
        go(tmp_path / "run", teacher, "drsformer-tiny", data, 1, loss_weights=LossWeights(1, 2, 0.1, 0, 0.1))
    checkpoint.save(teacher, network(expansion=2.0), {})
    with pytest.raises(InputError, match=r"teacher="):
        go(tmp_path / "run", teacher, "drsformer-tiny", data, 1)


def test_rainy_photographs_are_some_of_the_patches(data, teacher, tmp_path):
    patches = PatchesOfPhotographs([find_pairs(data)], Recipe(patch=16))
    plain = [patches[i] for i in range(40)]
    patches.photographs, patches.unlabelled = sorted((data / "input").iterdir()), 0.25
    mixed = [patches[i] for i in range(40)]
    photographs = [bool(clean.isnan().all()) for _, clean in mixed]
    assert 3 < sum(photographs) < 20
    assert all(rainy.isfinite().all() for rainy, _ in mixed)
    assert all(torch.equal(a[1], b[1]) for a, b, p in zip(plain, mixed, photographs, strict=True) if not p)
    patches.warm_up()
    assert set(patches.cache) >= set(patches.photographs)
    go(tmp_path / "run", teacher, "drsformer-tiny", data, 3, rainy=data / "input", unlabelled=0.5)
    made = checkpoint.load(tmp_path / "run" / "last.safetensors").provenance
    assert made["trained_on"][1:] == ["data/input"]
    assert made["steps"][0]["options"]["unlabelled"] == 0.5


def test_compiled_student_and_teacher_are_tapped_too(monkeypatch):
    """Compiled block by block, with the tracing of torch.compile but without its code generation."""
    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **k: compile_block(self, backend="eager", **k))
    readable, teacher = network(expansion=2.0, **SHALLOW), trainable(network(**SHALLOW))
    plain = Distillation(trainable(network(**SHALLOW)), readable, ALL)(
        trainable(readable), image(16, 16), image(16, 16, 1)
    )
    student = trainable(readable)
    loss = Distillation(teacher, student, ALL)
    for part in (student, teacher):
        compile_blocks(part)
    for _ in range(2):
        terms = loss(student, image(16, 16), image(16, 16, 1))
        sum(terms.values()).backward()
        assert {k: v.item() for k, v in terms.items()} == pytest.approx(
            {k: v.item() for k, v in plain.items()}, rel=1e-4
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student", "drsformer-xxl"], "--student: expected a checkpoint or one of drsformer, "),
        (["--l1", "0", "--l1-teacher", "0"], "expected --l1, --l1-teacher or --frequency above 0"),
        (["--frequency", "-1"], "--frequency: expected at least 0, found -1"),
        (["--l1", "inf"], "--l1: expected a finite number, found inf"),
        (["--attention", "1", "--attention-levels"], "--attention-levels: expected at least one with --attention"),
        (["--teacher", "absent.pth"], "absent.pth: no such checkpoint"),
        (["--teacher", "run/best.safetensors"], "--output: expected another file than --teacher"),
        (["--student", "run/last.safetensors"], "--output: expected another file than --student"),
        (["--rainy", "absent"], "absent"),
        (["--rainy", "data/input", "--unlabelled", "2"], "--unlabelled: expected 0 to 1"),
        (
            ["--rainy", "data/input", "--unlabelled", "1", "--l1-teacher", "0"],
            "--unlabelled: expected less than 1 without --l1-teacher or --frequency",
        ),
        (["--attention", "1", "--student", "drsformer-xs"], "the same heads in latent"),
        (["--blockwise", "2"], "--blockwise: expected 0 to 1, found 2"),
        (["--blockwise", "1", "--cuda-graph"], "--blockwise: expected 0 with --cuda-graph"),
    ],
)
def test_mistakes_end_with_status_2(data, teacher, tmp_path, options, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--teacher",
        "teacher.safetensors",
        "--student",
        "drsformer-tiny",
        "--data",
        "data",
        "--output",
        "run",
        "--accelerator",
        "cpu",
        "--devices",
        "1",
        "--iterations",
        "1",
        "--patch",
        "16",
    ]
    Path("run").mkdir()
    for name in ("last", "best"):
        Path(f"run/{name}.safetensors").touch()
    monkeypatch.setattr(sys, "argv", ["distill", *words, *options])
    with pytest.raises(SystemExit) as error:
        main(command, None)
    assert error.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said


def test_command_on_two_processes_prints_its_result_once(data, shallow, tmp_path):
    words = [
        "--teacher",
        str(shallow[0]),
        "--student",
        shallow[1],
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
        "--accelerator",
        "cpu",
        "--devices",
        "2",
        "--iterations",
        "2",
        "--patch",
        "16",
        "--batch",
        "2",
        "--features",
        "1",
        "--minutes",
        "0",
    ]
    command = [sys.executable, "-m", "compress.distill", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"iteration": 1, "finished": False}
    assert "Not finished" in result.stderr

"""`bupo bench`: its sides compute the same, a side that does not is found, and every case is a row, with numbers or a reason."""

import json
import math
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from models import FAMILIES
from problems import covering, first_of

from bupo import bench, cli
from bupo.bench import SIDES, Case, Trainee, bench_config, compare, measure, random_batch
from bupo.distributed import process_group
from bupo.measurement import peak_bytes

ALL = tuple(SIDES[1])
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
RATES = {"gemm_tflops": {"bfloat16": 1.0, "float32": 0.5}, "copy_gb_per_s": 10.0}


@pytest.fixture(autouse=True)
def _memory_is_not_measured(monkeypatch):
    """The profiler takes half a second to start."""
    monkeypatch.setattr(bench, "peak_bytes", lambda step, device: step() and 1)


@pytest.fixture
def trainee_of():
    """A tiny trainee, in a process group of its own."""
    groups = []

    def make(family="qwen3", precision="float32", checkpointing=True, **values):
        config = bench_config("tiny", {"device": "cpu", "precision": precision, "checkpoint_activations": checkpointing})
        groups.append(process_group(config.hardware))
        return Trainee(FAMILIES[family][0](**TINY | values), config, groups[-1].__enter__())

    yield make
    for group in groups:
        group.__exit__(None, None, None)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command on a tiny model; returns the exit code and what it printed."""
    monkeypatch.setattr(bench, "rates", lambda device: RATES)
    (tmp_path / "tiny.json").write_text(json.dumps({"model_type": "qwen3"} | TINY))

    def run(*words, model="tiny.json"):
        sizes = ("--tokens", "16", "--context", "8", "--rounds", "2")
        given = ("--device", "cpu", "--model-config", str(tmp_path / model), *sizes, *words)
        code = cli.main(["bench", *given])
        return code, capsys.readouterr()

    return run


def rows_in(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text())["step"]["rows"]


def wrong_by(factor):
    """A side whose loss is ``factor`` times what it should be."""
    return lambda trainee, case, batch: bench.bupo_step(trainee, case, bench_scaled(batch, factor))


def bench_scaled(batch, factor):
    return type(batch)(**vars(batch) | {"coefficients": batch.coefficients * factor})


@pytest.mark.parametrize(
    ("precision", "checkpointing", "layer"),
    covering(
        [("float32", True, 1), ("float32", True, 2), ("float32", False, 3), ("bfloat16", True, 2), ("bfloat16", False, 3)],
        1,
        unpacked=True,
    ),
)
def test_all_sides_compute_the_same_step_in_both_phases(trainee_of, precision, checkpointing, layer):
    trainee = trainee_of(precision=precision, checkpointing=checkpointing)
    before = {name: parameter.detach().clone() for name, parameter in trainee.model.named_parameters()}
    for phase, names in SIDES.items():
        rows, wrong = measure(trainee, Case(phase, layer, 2, 8), ALL, rounds=1)
        assert wrong == []
        assert [row["name"] for row in rows] == [name for name, _ in names.values()]
        assert all(row["reason"] is None for row in rows)
        assert len({round(row["loss"], 6) for row in rows}) == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainee.model.named_parameters())


@pytest.mark.parametrize("family", first_of(["llama", "mistral", "qwen2"]))
def test_sides_agree_on_every_family_of_models(trainee_of, family):
    trainee = trainee_of(family, tie_word_embeddings=False)
    for phase in SIDES:
        rows, wrong = measure(trainee, Case(phase, 2, 2, 8), ALL, rounds=1)
        assert wrong == []
        assert all(row["reason"] is None for row in rows)


def test_gradients_of_a_step_are_those_that_its_optimizer_was_given(trainee_of):
    trainee, case = trainee_of(), Case(1, 2, 2, 8)
    batch, gradients = random_batch(case, 97, torch.device("cpu")), {}
    assert compare(trainee, lambda: bench.bupo_step(trainee, case, batch), gradients).difference == 0
    with_gradient = {name for name, gradient in gradients.items() if gradient is not None}
    assert with_gradient == {name for name in gradients if "layers.2." not in name and name != "model.norm.weight"}
    of_twice = compare(trainee, lambda: wrong_by(1.5)(trainee, case, batch), gradients)
    assert of_twice.difference == pytest.approx(0.5, rel=1e-3)
    # A gradient that only one of the two has is a difference, too.
    of_final = compare(trainee, lambda: bench.bupo_step(trainee, Case(2, 2, 2, 8), batch), gradients)
    assert of_final.difference == math.inf


@pytest.mark.parametrize(("side", "layers"), [("naive", 3), ("naive-truncated", 2), ("bupo-not-truncated", 3), ("bupo", 2)])
def test_only_what_is_not_truncated_runs_the_layers_above(trainee_of, side, layers):
    trainee, case, ran = trainee_of(checkpointing=False), Case(1, 2, 2, 8), []
    for i, layer in enumerate(trainee.model.model.layers, 1):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    SIDES[1][side][1](trainee, case, random_batch(case, 97, torch.device("cpu")))
    assert ran == [*range(1, layers + 1)] * 2


def test_every_round_has_new_tokens_which_are_the_same_for_all_sides(trainee_of, monkeypatch):
    seen = {"one": [], "other": []}

    def side(name):
        def step(trainee, case, batch):
            seen[name].append(batch.input_ids.tolist())
            return bench.bupo_step(trainee, case, batch)

        return name, step

    monkeypatch.setitem(SIDES, 1, {name: side(name) for name in seen})
    measure(trainee_of(), Case(1, 1, 2, 8), tuple(seen), rounds=3)
    assert seen["one"] == seen["other"]
    assert len({str(ids) for ids in seen["one"]}) == 4  # of the first two steps, which are not timed, and of three rounds


@pytest.mark.parametrize(
    ("precision", "place"), first_of([("float32", "backward"), ("bfloat16", "backward"), ("bfloat16", "forward")])
)
def test_a_side_that_raises_is_a_row_with_the_reason_and_the_others_go_on(trainee_of, monkeypatch, precision, place):
    def fails(trainee, case, batch):
        layer = trainee.model.model.layers[0]

        def give_up(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

        register = layer.register_forward_hook if place == "forward" else layer.register_full_backward_pre_hook
        register(give_up)
        return bench.bupo_step(trainee, case, batch)

    monkeypatch.setitem(SIDES[1], "naive", ("naive logit lens", fails))
    rows, wrong = measure(trainee_of(precision=precision), Case(1, 2, 2, 8), ALL, rounds=1)
    assert rows[0]["reason"] == "OutOfMemoryError: CUDA out of memory."
    assert "seconds" not in rows[0]
    assert wrong == []
    assert [row["reason"] for row in rows[1:]] == [None] * 3
    assert rows[1]["gradient_difference"] == 0  # the first that ran


def test_a_side_that_gives_up_late_has_no_numbers(trainee_of, monkeypatch):
    left = [4]

    def fails(trainee, case, batch):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("now")
        return bench.bupo_step(trainee, case, batch)

    monkeypatch.setitem(SIDES[2], "bupo", ("bupo", fails))
    naive, ours = measure(trainee_of(), Case(2, 1, 2, 8), ("naive", "bupo"), rounds=3)[0]
    assert ours["reason"] == "MemoryError: now"
    assert "seconds" not in ours
    assert len(naive["seconds_of_rounds"]) == 3


def test_what_does_not_fit_into_the_time_is_listed(command, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "compare", None)  # nothing is begun
    code, printed = command("--minutes", "1e-6", "--out", str(tmp_path / "out"))
    assert code == 0
    assert [row["reason"] for row in rows_in(tmp_path / "out")] == ["not within --minutes"] * 7
    assert printed.out.count("bupo, not truncated: not within --minutes") == 1


def test_rounds_that_do_not_fit_into_the_time_are_left_out(trainee_of, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(now)))
    # A second passes at every look: 5 times a side before the rounds, 5 times in a round, which is expected to take 2.
    rows, _ = measure(trainee_of(), Case(2, 1, 2, 8), ("naive", "bupo"), rounds=9, deadline=20)
    assert [len(row["seconds_of_rounds"]) for row in rows] == [2, 2]


def test_memory_is_what_a_step_needs_beyond_weights_and_optimizer_state(trainee_of, monkeypatch):
    monkeypatch.setattr(bench, "peak_bytes", peak_bytes)
    trainee = trainee_of(vocab_size=8192, max_position_embeddings=64)
    rows, _ = measure(trainee, Case(1, 2, 4, 64), ALL, rounds=1)
    peaks, logits = [row["peak_bytes"] for row in rows], 4 * 64 * 8192 * 4
    naive, one_head, *ours = peaks
    assert naive >= 4 * logits  # of two heads, log-softmax of one and its gradient
    assert one_head <= naive - 0.9 * logits
    assert max(ours) < naive / 2


def test_the_command_writes_every_row_of_a_sweep(command, tmp_path):
    sweep = ("--layer", "1", "3", "--tokens", "16", "32", "--context", "8", "16", "--sides", "naive", "bupo")
    code, printed = command(*sweep, "--out", str(tmp_path / "out"))
    assert code == 0, printed.err
    rows = rows_in(tmp_path / "out")
    key = ("phase", "layer", "sequences", "length", "name")
    sizes = ((2, 8), (4, 8), (1, 16), (2, 16))
    policies = [(1, 1), (1, 3), (2, None)]
    names = {phase: [SIDES[phase][side][0] for side in ("naive", "bupo")] for phase in SIDES}
    expected = {(*policy, *size, name) for policy in policies for size in sizes for name in names[policy[0]]}
    assert len(rows) == len(expected)
    assert {tuple(row[name] for name in key) for row in rows} == expected
    for row in rows:
        assert (row["model"], row["layers"], row["dtype"], row["checkpointing"]) == ("tiny", 3, "float32", True)
        assert row["reason"] is None
        assert len(row["seconds_of_rounds"]) == 2
        assert min(row["seconds_of_rounds"]) <= row["seconds"] <= max(row["seconds_of_rounds"])
        assert row["tokens_per_second"] == pytest.approx(row["sequences"] * row["length"] / row["seconds"])
        assert row["gradient_difference"] <= bench.tolerance("float32")
    assert printed.out.count("× naive") == 12
    assert "phase 1: layer 3, 1 x 16 tokens" in printed.out
    assert "0.5 TFLOP/s in float32" in printed.out


def test_a_side_that_computes_something_else_fails_the_command(command, tmp_path, monkeypatch):
    monkeypatch.setitem(SIDES[1], "bupo", ("bupo", wrong_by(1.01)))
    code, printed = command("--phase", "1", "--out", str(tmp_path / "out"))
    assert code == 1
    assert "phase 1: layer 1, 2 x 8 tokens: bupo disagrees with the first side" in printed.err
    *others, ours = rows_in(tmp_path / "out")
    assert "disagrees" in ours["reason"]
    assert "seconds" not in ours
    assert all(row["reason"] is None for row in others)


def test_a_gradient_that_is_wrong_is_found_where_the_loss_is_right(command, monkeypatch):
    def without_a_gradient(trainee, case, batch):
        handle = trainee.model.model.layers[0].mlp.up_proj.weight.register_hook(torch.zeros_like)
        try:
            return bench.bupo_step(trainee, case, batch)
        finally:
            handle.remove()

    monkeypatch.setitem(SIDES[2], "bupo", ("bupo", without_a_gradient))
    code, printed = command("--phase", "2", "--sides", "naive", "bupo")
    assert code == 1
    assert "1.0e+00 of the largest (model.layers.0.mlp.up_proj.weight)" in printed.err


def test_the_default_layer_is_a_sixth_of_the_depth():
    for depth, layer in ((2, 1), (24, 4), (36, 6)):
        architecture = FAMILIES["qwen3"][0](**TINY | {"num_hidden_layers": depth})
        assert {case.layer for case in bench.plan("tiny", architecture, None, [8], [8], [1, 2])} == {layer}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--layer", "1", "4"), "--layer: 4 given, accepted are 1 to 3 (the layers of tiny)"),
        (("--layer", "0"), "--layer: 0 given"),
        (("--context", "33"), "--context: 33 given, accepted are 1 to 32 (the positions of tiny)"),
        (("--context", "0"), "--context: 0 given"),
        (("--tokens", "16", "20"), "--tokens: 20 given, accepted are multiples of --context (8)"),
        (("--tokens", "0"), "--tokens: 0 given"),
        (("--rounds", "0"), "--rounds: 0 given, accepted are 1 and more"),
        (("--minutes", "0"), "--minutes: 0.0 given, accepted are numbers above 0"),
        (("--sides", "bupo-not-truncated", "--phase", "2"), "--sides: bupo-not-truncated given, accepted in phase 2 are naive,"),
        (("--out", "{tmp}/tiny.json"), "--out: "),
        (("--model-config", "{tmp}/none.json"), "none.json is not a file, accepted is a model's config.json"),
        (("--model-config", "{tmp}/gpt.json"), "--model-config: gpt is of type 'gpt_neox', accepted are llama, "),
        (("--model-config", "{tmp}/bad.json"), "bad.json cannot be used"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(command, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(bench, "Trainee", None)
    (tmp_path / "gpt.json").write_text(json.dumps({"model_type": "gpt_neox", "num_hidden_layers": 2}))
    (tmp_path / "bad.json").write_text("{")
    code, printed = command(*(word.format(tmp=tmp_path) for word in words))
    assert code == 2
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_a_model_that_does_not_fit_is_refused(command, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench, "Trainee", out_of_memory)
    code, printed = command()
    assert code == 2
    assert "--model-config: tiny and its optimizer take 0 GiB, more than " in printed.err


def test_a_checkout_that_is_not_installed_will_do(monkeypatch, capsys):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", not_installed)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == "bupo not installed\n"


def test_a_device_that_is_not_there_is_named(command):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, printed = command("--device", "cuda")
    assert code == 2
    assert "hardware.device: 'cuda' given" in printed.err

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polyspan.checkpoints import TaskVector, dare, task_arithmetic, ties
from polyspan.checkpoints._magnitude_rank import largest_share
from polyspan.errors import CorruptFile, UnreadableFile, WrongContent
from polyspan.io import ShardedState, write_bytes, write_json, write_members


def states(seed, tasks=3, shapes=((4, 5), (5,), (2, 3, 2)), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def drawn(scale):
        return {f"w{i}": (scale * torch.randn(s, generator=generator)).to(dtype) for i, s in enumerate(shapes)}

    base = drawn(1.0)
    tuned = {f"task{t}": {k: base[k] + v for k, v in drawn(0.1).items()} for t in range(tasks)}
    return base, tuned


def flat(state):
    return torch.cat([state[name].flatten() for name in sorted(state)])


def literal_ties(base, tuned, density, scaling, reduction):
    """TIES as its formulas read: sort, compare, and go entry by entry."""
    b = flat(base).tolist()
    taus = [[x - y for x, y in zip(flat(t).tolist(), b, strict=True)] for t in tuned.values()]
    keep = max(1, round(density * len(b)))
    for tau in taus:
        limit = sorted(map(abs, tau))[-keep]
        tau[:] = [v if abs(v) >= limit else 0.0 for v in tau]
    sums = [sum(column) for column in zip(*taus, strict=True)]
    signs = [math.copysign(1, s) if s else 0 for s in sums]
    majority = math.copysign(1, sum(signs)) if sum(signs) else 0
    made = []
    for i, column in enumerate(zip(*taus, strict=True)):
        agree = [v for v in column if v * (signs[i] or majority) > 0]
        total = sum(agree)
        made.append(b[i] + scaling * (total / max(len(agree), 1) if reduction == "mean" else total))
    return torch.tensor(made)


@given(seed=st.integers(0, 10**6), a=st.floats(-2, 2), b=st.floats(-2, 2))
@settings(max_examples=15, deadline=None)
def test_task_vectors_add_scale_and_come_back_to_the_checkpoint_they_are_of(seed, a, b):
    base, tuned = states(seed, tasks=2)
    one, two = (TaskVector(base, t) for t in tuned.values())
    torch.testing.assert_close(one.apply_to(base), tuned["task0"])
    left, right = (a * one + two * b).tensors, (two * b - -(one * a)).tensors
    torch.testing.assert_close(left, right)
    merged = task_arithmetic(base, tuned, scaling=1, weights=[a, b])
    torch.testing.assert_close(merged, (a * one + b * two).apply_to(base), atol=1e-5, rtol=1e-5)


def test_norm_and_cosine_are_those_of_one_long_vector():
    base, tuned = states(1, tasks=2)
    one, two = (TaskVector(base, t) for t in tuned.values())
    x, y = flat(one.tensors), flat(two.tensors)
    assert one.norm() == pytest.approx(float(x.norm()))
    assert one.cosine(two) == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-5)
    assert (one * 0).cosine(two) == 0


def test_the_plain_average_is_task_arithmetic_with_one_over_the_tasks():
    base, tuned = states(2)
    merged = task_arithmetic(base, list(tuned.values()), scaling=1 / 3)
    for name in base:
        torch.testing.assert_close(merged[name], torch.stack([t[name] for t in tuned.values()]).mean(0))


@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]), mean=st.booleans())
@settings(max_examples=20, deadline=None)
def test_ties_equals_its_formulas(seed, density, mean):
    base, tuned = states(seed, tasks=4)
    reduction = "mean" if mean else "sum"
    mine = ties(base, tuned, density=density, scaling=0.7, reduction=reduction)
    torch.testing.assert_close(flat(mine), literal_ties(base, tuned, density, 0.7, reduction), atol=1e-6, rtol=1e-5)


def test_ties_gives_entries_that_cancel_the_sign_of_the_majority():
    base = {"w": torch.zeros(4)}
    tuned = [{"w": torch.tensor([1.0, 2.0, -3.0, 5.0])}, {"w": torch.tensor([-1.0, 2.0, 1.0, 5.0])}]
    merged = ties(base, tuned, density=1, scaling=1)["w"]
    torch.testing.assert_close(merged, torch.tensor([1.0, 4.0, -3.0, 10.0]))
    flipped = ties(base, [{"w": -t["w"]} for t in tuned], density=1, scaling=1)["w"]
    torch.testing.assert_close(flipped, -merged)


def test_a_threshold_a_tensor_keeps_something_of_every_tensor_and_one_for_all_does_not():
    base = {"large": torch.zeros(10), "small": torch.zeros(10)}
    tuned = [{"large": torch.arange(1.0, 11), "small": torch.arange(1.0, 11) / 1000}]
    one = ties(base, tuned, density=0.2, scaling=1)
    assert not one["small"].any()
    assert int((one["large"] != 0).sum()) == 4
    each = ties(base, tuned, density=0.2, scaling=1, scope="tensor")
    torch.testing.assert_close(each["small"].nonzero().flatten(), torch.tensor([8, 9]))
    torch.testing.assert_close(each["large"].nonzero().flatten(), torch.tensor([8, 9]))


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    share=st.floats(0.01, 1),
)
@settings(max_examples=60, deadline=None)
def test_the_streamed_threshold_is_that_of_a_sort(values, share):
    tensor = torch.tensor(values, dtype=torch.float32)
    found = largest_share(lambda: iter(tensor.split(7)), share)
    assert found == sorted(tensor.abs().tolist())[-max(1, round(share * len(values)))]


def test_dare_drops_at_random_keeps_the_expectation_and_its_seed():
    base, tuned = {"w": torch.zeros(20_000)}, [{"w": torch.ones(20_000)}]
    merged = dare(base, tuned, density=0.25, scaling=1)["w"]
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert float(merged.mean()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(dare(base, tuned, density=0.25, scaling=1)["w"], merged, atol=0, rtol=0)
    assert not torch.equal(dare(base, tuned, density=0.25, scaling=1, seed=1)["w"], merged)
    bare = dare(base, tuned, density=0.25, scaling=1, rescale=False)["w"]
    torch.testing.assert_close(4 * bare, merged)


def test_dare_does_not_depend_on_the_order_of_tensors_and_nothing_dropped_is_task_arithmetic():
    base, tuned = states(3)
    turned = {name: base[name] for name in reversed(base)}
    torch.testing.assert_close(dare(base, tuned), {n: dare(turned, tuned)[n] for n in base}, atol=0, rtol=0)
    torch.testing.assert_close(dare(base, tuned, density=1.0), task_arithmetic(base, tuned))
    torch.testing.assert_close(dare(base, tuned, density=1.0, elect=True), ties(base, tuned, density=1.0))


def test_a_mask_of_ones_changes_nothing_and_another_is_divided_by_its_mean():
    base, tuned = states(4)
    constant = {name: torch.full_like(t, 0.3) for name, t in base.items()}
    torch.testing.assert_close(task_arithmetic(base, tuned, mask=constant), task_arithmetic(base, tuned))
    half = {name: (torch.arange(t.numel()) % 2.0).reshape(t.shape) for name, t in base.items()}
    made = task_arithmetic(base, tuned, mask=half)
    for name, m in half.items():
        change = 0.3 * sum(t[name] - base[name] for t in tuned.values())
        torch.testing.assert_close(made[name] - base[name], change * m / m.mean(), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="mask must have an entry for each number of the base, got none for w1"):
        task_arithmetic(base, tuned, mask={k: v for k, v in half.items() if k != "w1"})


@pytest.mark.parametrize("merge", [task_arithmetic, ties, dare])
def test_nothing_given_is_changed_and_the_result_shares_no_memory(merge):
    base, tuned = states(5)
    before = copy.deepcopy((base, tuned))
    merged = merge(base, tuned)
    for tensor in merged.values():
        tensor.zero_()
    torch.testing.assert_close((base, tuned), before, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay_and_narrow_ones_are_added_in_float32(dtype):
    base, tuned = states(6, dtype=dtype)
    merged = task_arithmetic(base, tuned, scaling=0.3)
    wide = torch.promote_types(dtype, torch.float32)
    for name in base:
        start = base[name].to(wide)
        exact = start + sum(0.3 * (t[name].to(wide) - start) for t in tuned.values())
        assert merged[name].dtype == dtype
        torch.testing.assert_close(merged[name], exact.to(dtype), atol=1e-2 if wide == torch.float32 else 1e-12, rtol=0)


def test_running_statistics_are_averaged_and_integers_are_the_bases():
    base = nn.BatchNorm1d(3)
    one, two = copy.deepcopy(base), copy.deepcopy(base)
    one.running_mean.fill_(1.0), two.running_mean.fill_(3.0)
    one.num_batches_tracked.fill_(7)
    merged = task_arithmetic(base, {"a": one, "b": two})
    torch.testing.assert_close(merged["running_mean"], torch.full((3,), 2.0))
    assert int(merged["num_batches_tracked"]) == 0
    assert sorted(TaskVector(base, one).skipped) == ["num_batches_tracked", "running_mean", "running_var"]


def test_names_and_shapes_that_differ_are_listed_ten_at_most():
    base = {f"w{i:02d}": torch.zeros(2) for i in range(15)}
    with pytest.raises(ValueError, match=r"w00 is missing; .*w09 is missing and 5 more") as told:
        task_arithmetic(base, {"short": {}})
    assert "finetuned['short']" in str(told.value)
    assert "w10" not in str(told.value)
    with pytest.raises(ValueError, match="other is not in the base"):
        TaskVector({"w": torch.zeros(2)}, {"w": torch.zeros(2), "other": torch.zeros(1)})


def test_a_resized_vocabulary_is_an_error_with_advice_and_can_be_ignored():
    base = {"embed": torch.zeros(10, 4), "w": torch.zeros(3)}
    tuned = {"embed": torch.ones(12, 4), "w": torch.ones(3)}
    with pytest.raises(ValueError, match=r"embed is \(10, 4\) in the base and \(12, 4\) there; .*vocabulary"):
        task_arithmetic(base, [tuned])
    merged = task_arithmetic(base, [tuned], ignore_keys=["emb*"], scaling=1)
    assert not merged["embed"].any()
    torch.testing.assert_close(merged["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda b, t: ties(b, t, density=0), r"density must be a share in \(0, 1\], got 0"),
        (lambda b, t: dare(b, t, density=1.5), r"density must be a share in \(0, 1\], got 1.5"),
        (lambda b, t: ties(b, t, reduction="max"), "reduction must be 'sum' or 'mean', got 'max'"),
        (lambda b, t: ties(b, t, scope="layer"), "scope must be 'model' or 'tensor', got 'layer'"),
        (lambda b, t: dare(b, t, seed=-1), "seed must be at least 0, got -1"),
        (lambda b, t: task_arithmetic(b, t, scaling=math.nan), "scaling must be a finite number, got nan"),
        (lambda b, t: task_arithmetic(b, t, weights=[1]), "weights must be 3 finite numbers, one a checkpoint"),
        (lambda b, _: task_arithmetic(b, {}), "finetuned must hold at least one checkpoint, got none"),
        (lambda b, t: task_arithmetic(b, t["task0"]), "finetuned must hold checkpoints by task, got one state dict"),
        (lambda b, t: task_arithmetic(3, t), "base must be a module, a state dict or a path, got int"),
        (lambda b, _: task_arithmetic(b, {"a": {"w0": 3}}), r"finetuned\['a'\] must map names to tensors, got int"),
        (lambda b, t: task_arithmetic(b, t, ignore_keys="w0"), "ignore_keys must be a list of patterns"),
        (lambda b, t: TaskVector(b, t["task0"]) + TaskVector({"v": b["w0"]}, {"v": b["w0"]}), "must have the same"),
        (lambda b, t: TaskVector(b, t["task0"]).apply_to({}), "base must have the tensors of the task vector"),
    ],
)
def test_bad_input_is_named(call, told):
    with pytest.raises(ValueError, match=told):
        call(*states(7))


def numpy_state(state):
    return {name: t.numpy() for name, t in state.items()}


def test_files_and_sharded_folders_merge_as_state_dicts_do(tmp_path):
    base, tuned = states(8)
    write_members(tmp_path / "base.safetensors", numpy_state(base))
    for task, state in tuned.items():
        (tmp_path / task).mkdir()
        parts = {"a.safetensors": ["w0"], "b.safetensors": ["w1", "w2"]}
        for file, names in parts.items():
            write_members(tmp_path / task / file, numpy_state({n: state[n] for n in names}))
        placed = {name: file for file, names in parts.items() for name in names}
        write_json(tmp_path / task / "model.safetensors.index.json", {"weight_map": placed})
    paths = {task: tmp_path / task for task in tuned}
    for merge in (task_arithmetic, ties, dare):
        made = merge(tmp_path / "base.safetensors", paths)
        torch.testing.assert_close(made, merge(base, tuned), atol=0, rtol=0)


def test_a_bfloat16_file_is_read_in_its_own_dtype(tmp_path):
    from safetensors.torch import save_file

    state = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()}
    save_file(state, tmp_path / "half.safetensors")
    found = ShardedState(tmp_path / "half.safetensors")
    assert found.dtype("w") == found["w"].dtype == torch.bfloat16
    torch.testing.assert_close(found["w"], state["w"], atol=0, rtol=0)


def test_broken_checkpoints_are_refused(tmp_path):
    with pytest.raises(UnreadableFile, match=r"0 \.safetensors files"):
        ShardedState(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"w": "../w.safetensors"}})
    with pytest.raises(WrongContent, match="a file outside the folder"):
        ShardedState(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"w": "w.safetensors"}})
    write_members(tmp_path / "w.safetensors", {"v": np.zeros(2, np.float32)})
    with pytest.raises(WrongContent, match="no tensor 'w'"):
        ShardedState(tmp_path)
    write_members(tmp_path / "nan.safetensors", {"w": np.array([1, np.nan], np.float32)})
    with pytest.raises(WrongContent, match="NaN or infinity"):
        ShardedState(tmp_path / "nan.safetensors")["w"]
    whole = (tmp_path / "w.safetensors").read_bytes()
    write_bytes(tmp_path / "short.safetensors", whole[:-3])
    with pytest.raises(CorruptFile):
        ShardedState(tmp_path / "short.safetensors")
    write_bytes(tmp_path / "flipped.safetensors", whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptFile, match="changed bytes"):
        ShardedState(tmp_path / "flipped.safetensors")["v"]


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_adapter_merges_as_peft_itself_merges_it(tmp_path, rslora):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        start = copy.deepcopy(base.state_dict())
        config = peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=["0", "2"], rank_pattern={"2": 3}, alpha_pattern={"2": 5},
            use_rslora=rslora, init_lora_weights=False,
        )  # fmt: skip
        model = peft.get_peft_model(base, config)
        model.save_pretrained(tmp_path / "adapter")
        merged = model.merge_and_unload().state_dict()
    torch.testing.assert_close(task_arithmetic(start, {"a": tmp_path / "adapter"}, scaling=1), dict(merged))
    assert TaskVector(start, tmp_path / "adapter").norm() > 0.1


def test_adapters_that_are_no_plain_lora_or_fit_no_base_are_refused(tmp_path):
    base, _ = states(9)
    write_json(tmp_path / "adapter_config.json", {"peft_type": "IA3"})
    with pytest.raises(WrongContent, match="peft_type 'IA3'; expected a plain LoRA"):
        task_arithmetic(base, [tmp_path])
    with pytest.raises(ValueError, match="base must be a whole checkpoint, got the adapter"):
        task_arithmetic(tmp_path, [base])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    factors = {"base_model.model.layer.lora_A.weight": np.zeros((2, 5), np.float32)}
    write_members(tmp_path / "adapter_model.safetensors", factors)
    with pytest.raises(WrongContent, match=r"no tensor 'base_model.model.layer.lora_B.weight'"):
        task_arithmetic(base, [tmp_path])
    factors["base_model.model.layer.lora_B.weight"] = np.zeros((4, 2), np.float32)
    write_members(tmp_path / "adapter_model.safetensors", factors)
    with pytest.raises(WrongContent, match=r"an update of layer.weight; expected names that the base has"):
        task_arithmetic(base, [tmp_path])

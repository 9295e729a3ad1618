import math

import pytest
import torch

from polyspan.checkpoints import MergeScore, merge_recipe, read_recipe, score_merge
from polyspan.checkpoints.merge_scores import plan_scoring
from polyspan.cli.merge import merge
from polyspan.errors import WrongContent
from polyspan.io import list_folder, write_json, write_text
from polyspan.run import torch_generator

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

RECIPE = """
merge_method: task_arithmetic
base_model: base
models:
  - model: cats
  - model: dogs
parameters: {lambda: 0.5}
"""
TEXTS = {"cats": "a cat sat on a mat . " * 40, "dogs": "the dog ran off to the log . " * 40}


@pytest.fixture
def folder(tmp_path):
    transformers.logging.disable_progress_bar()
    words = sorted({word for text in TEXTS.values() for word in text.split()})
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=".")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(words), max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for task, text in TEXTS.items():
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(15):
            loss = model(ids[:, :60], labels=ids[:, :60]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        model.save_pretrained(tmp_path / task)
        write_text(tmp_path / f"{task}.txt", text)
    write_text(tmp_path / "recipe.yaml", RECIPE)
    return tmp_path


def literal(folder, ids, length):
    """Perplexity of whole pieces of a text, one at a time."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    total = count = 0
    for start in range(0, len(ids) - length, length):
        piece = ids[start : start + length + 1]
        with torch.no_grad():
            logits = model(piece[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
        count += len(piece) - 1
    return math.exp(total / count)


def test_each_checkpoint_is_measured_on_each_text_and_the_merge_serves_both(folder):
    recipe = read_recipe(folder / "recipe.yaml")
    merge_recipe(recipe, folder / "out")
    texts = {task: folder / f"{task}.txt" for task in TEXTS}
    found = score_merge(recipe, folder / "out", texts, compare=["average", "ties", "task_arithmetic"], context=20)
    assert [(row.name, row.kind) for row in found] == [
        ("base", "base"), ("task_arithmetic", "merged"), ("cats", "model"), ("dogs", "model"),
        ("average", "compared"), ("ties", "compared"),
    ]  # fmt: skip
    by_name = {row.name: row.perplexity for row in found}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    for task, text in TEXTS.items():
        ids = torch.tensor(tokenizer(text)["input_ids"])
        for name, where in (("base", "base"), ("task_arithmetic", "out"), ("cats", "cats")):
            assert by_name[name][task] == pytest.approx(literal(folder / where, ids, 20), rel=1e-4)
        assert by_name[task][task] < by_name["task_arithmetic"][task] < by_name["base"][task]
    # Half of each of two changes is their average.
    assert by_name["average"] == pytest.approx(by_name["task_arithmetic"], rel=1e-5)
    assert not [path for path in list_folder(folder, "*") if path.name.endswith(".measured")]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_is_measured_as_the_model_that_it_makes(folder):
    peft = pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch_generator(1)
    with torch.no_grad():
        for name, part in adapted.named_parameters():
            if "lora_B" in name:
                part.copy_(torch.randn(part.shape, generator=generator))
    adapted.save_pretrained(folder / "cats-lora")
    write_text(folder / "recipe.yaml", RECIPE.replace("model: cats", "model: cats-lora"))
    recipe = read_recipe(folder / "recipe.yaml")
    merge_recipe(recipe, folder / "out")
    found = score_merge(recipe, folder / "out", {"text": folder / "cats.txt"}, context=20)
    adapted.merge_and_unload().save_pretrained(folder / "whole")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    expected = literal(folder / "whole", torch.tensor(tokenizer(TEXTS["cats"])["input_ids"]), 20)
    assert next(row for row in found if row.name == "cats-lora").perplexity["text"] == pytest.approx(expected, rel=1e-4)


def test_weights_alone_and_tasks_of_any_name_are_measured_beside_the_files_of_the_base(folder):
    text = RECIPE.replace("model: cats", "model: cats/model.safetensors\n    name: a/b")
    write_text(folder / "recipe.yaml", text)
    recipe = read_recipe(folder / "recipe.yaml")
    merge_recipe(recipe, folder / "out")
    found = score_merge(recipe, folder / "out", {"text": folder / "cats.txt"}, context=20)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    expected = literal(folder / "cats", torch.tensor(tokenizer(TEXTS["cats"])["input_ids"]), 20)
    assert next(row for row in found if row.name == "a/b").perplexity["text"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"context": 100}, "context must be at most 32, the longest that the model takes, got 100"),
        ({"max_tokens": 1}, "max_tokens must be at least 2, got 1"),
        ({"device": "foo"}, "device must be 'auto' or one that torch knows"),
        ({"device": "cuda:7"}, "device must be in this machine"),
    ],
)
def test_options_are_looked_at_before_anything_is_merged(folder, options, told):
    options = {"context": 20, **options}
    with pytest.raises(ValueError, match=told):
        plan_scoring(read_recipe(folder / "recipe.yaml"), {"text": folder / "cats.txt"}, **options)
    command = {"out": folder / "out", "eval": [str(folder / "cats.txt")], **options}
    with pytest.raises(ValueError, match=told):
        merge(folder / "recipe.yaml", **command)
    assert not (folder / "out").exists()


def test_what_cannot_be_measured_is_named(folder):
    recipe = read_recipe(folder / "recipe.yaml")
    merge_recipe(recipe, folder / "out")
    texts = {"cats": folder / "cats.txt"}
    with pytest.raises(ValueError, match="texts must hold at least one text, got none"):
        score_merge(recipe, folder / "out", {})
    with pytest.raises(ValueError, match=r"compare must hold some of average, .*, got 'fisher'"):
        score_merge(recipe, folder / "out", texts, compare=["fisher"])
    write_text(folder / "empty.txt", "")
    with pytest.raises(WrongContent, match="no token"):
        score_merge(recipe, folder / "out", {"a": folder / "empty.txt"})
    write_json(folder / "dogs" / "config.json", {"architectures": ["Nothing"]})
    with pytest.raises(WrongContent, match="architectures"):
        score_merge(recipe, folder / "out", texts)
    assert isinstance(score_merge(recipe._replace(models={}), folder / "out", texts)[0], MergeScore)

"""Text from a model: what is drawn, from what set, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hakari.training.config import Model, MoE
from hakari.training.generation import generate, pick
from hakari.training.hugging_face import save
from hakari.training.model import Transformer, initialise

torch.set_num_threads(1)

PROMPT = [3, 1, 4, 1, 5]


def model(**changes: object) -> Transformer:
    sizes = {"vocabulary": 64, "dim": 24, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 32}
    found = Transformer(Model(**(sizes | {"initial_std": 0.5} | changes)))
    initialise(found, seed=1)
    return found


def sparse() -> Transformer:
    return model(moe=MoE(experts=4, hidden=16))


@pytest.mark.parametrize("make", [model, sparse])
def test_greedy_takes_the_likeliest_token_of_a_full_forward_each_time(make) -> None:
    net = make()
    found = generate(net, PROMPT, 12, temperature=0)
    tokens = list(PROMPT)
    net.eval()
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(net(torch.tensor([tokens]))[0, -1].argmax()))
    assert PROMPT + found == tokens
    assert len(set(found)) > 2


@pytest.mark.filterwarnings("default")
def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    net = model(tied=False)
    save(net, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    written = theirs.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert PROMPT + generate(net, PROMPT, 20, temperature=0) == written[0].tolist()


def test_the_seed_fixes_the_draws_and_another_seed_gives_others() -> None:
    net = model(initial_std=0.05)
    one, same, other = (generate(net, PROMPT, 20, seed=seed) for seed in (5, 5, 6))
    assert one == same
    assert one != other
    # the first tokens do not depend on how many follow
    assert generate(net, PROMPT, 7, seed=5) == one[:7]


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


@pytest.mark.parametrize(
    ("top_p", "temperature", "expected"),
    [
        (1.0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (0.5, 1.0, [0, 4 / 7, 0, 3 / 7]),  # 0.4 does not reach 0.5: the next one is needed
        (0.75, 1.0, [0, 4 / 9, 2 / 9, 3 / 9]),
        (0.3, 1.0, [0, 1, 0, 0]),
        (1.0, 0.5, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (0.8, 0.5, [0, 16 / 25, 0, 9 / 25]),
        (0.9, 1e-9, [0, 1, 0, 0]),
        (0.9, 1e-320, [0, 1, 0, 0]),
        (0.9, 0.0, [0, 1, 0, 0]),
    ],
)
def test_tokens_come_from_the_nucleus_in_proportion(
    top_p: float, temperature: float, expected: list[float]
) -> None:
    coins = (torch.arange(2000) + 0.5) / 2000
    drawn = [pick(LOGITS, float(coin), temperature, top_p) for coin in coins]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 2000
    torch.testing.assert_close(
        shares, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-3
    )


def test_the_largest_coin_stays_in_the_nucleus() -> None:
    # sums of probabilities may end below 1, and this coin is the largest double below 1
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    assert pick(logits, 1 - 2**-53, 1.0, 1.0) == int(logits.argmin())


def test_generation_ends_before_the_stop_token_and_tells_each_token() -> None:
    net, told = model(), []
    whole = generate(net, PROMPT, 12, temperature=0)
    stop = whole[4]
    found = generate(net, PROMPT, 12, temperature=0, stop=stop, on_token=told.append)
    assert found == told == whole[: whole.index(stop)]
    assert generate(net, PROMPT, 0) == []


def test_the_model_sees_the_last_tokens_of_its_context_only() -> None:
    net = model()
    assert generate(net, [9, 9, *PROMPT], 1, context=5, temperature=0) == generate(
        net, PROMPT, 1, temperature=0
    )
    seen = []
    hook = net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    generate(net, PROMPT, 6, context=7)
    generate(net, PROMPT, 3)
    hook.remove()
    assert seen == [5, 6, 7, 7, 7, 7, 5, 6, 7]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training: bool) -> None:
    net = sparse().train(training)
    generate(net, PROMPT, 2)
    assert net.training is training
    net.embed.weight.data[PROMPT[-1]] = torch.nan
    with pytest.raises(ValueError, match="the logits after 5 tokens are not finite"):
        generate(net, PROMPT, 2)
    assert net.training is training
    assert all(weight.grad is None for weight in net.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "the prompt has no tokens: give it at least one"),
        ({"tokens": [1, 64]}, r"tokens \[64\] are not in 0 .. 63"),
        ({"tokens": [-1]}, r"tokens \[-1\] are not in 0 .. 63"),
        ({"count": -1}, "count = -1 is below 0"),
        ({"temperature": -0.5}, "temperature = -0.5 is below 0"),
        ({"temperature": float("nan")}, "temperature = nan is below 0"),
        ({"context": -2}, "context = -2 is below 0"),
        ({"top_p": 0}, r"top_p = 0 is not in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p = 1.5 is not in \(0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model(), **({"tokens": PROMPT, "count": 3} | change))

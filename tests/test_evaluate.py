import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from pftools import evaluate
from pftools.errors import PftoolsError
from pftools.evaluate.beginnings import best_stretches, common_length
from pftools.evaluate.tasks import load_tasks
from tests import oracles
from tests.families import checks
from tests.tiny import tiny_blocks, tiny_llama, tiny_tokenizer


def test_perplexity_equals_the_oracle():
    model = tiny_llama()
    result = evaluate.perplexity(model, tiny_blocks(), batch_size=3, progress=False)
    assert result.perplexity == pytest.approx(oracles.perplexity(model, tiny_blocks()), rel=1e-5)
    assert result.block_nll.shape == (8,) and result.block_nll.dtype == torch.float64
    assert result.perplexity == pytest.approx(float(result.block_nll.mean().exp()))


def test_a_broken_model_and_no_blocks_are_named():
    model = tiny_llama()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(PftoolsError, match="block 0 is not a number"):
        evaluate.perplexity(model, tiny_blocks(), progress=False)
    with pytest.raises(PftoolsError, match="shape"):
        evaluate.perplexity(model, tiny_blocks()[:0], progress=False)


def requests(n_prefixes=3, n_questions=12, prefix=300, choices=(" a", " b", " long choice")):
    texts = []
    for number in range(n_prefixes):
        shared = f"{number} " + "example question and answer. " * (prefix // 29)
        texts += [
            (f"{shared}{number}-{question} is it?" + "?" * (question % 4), choice)
            for question in range(n_questions)
            for choice in choices
        ]
    texts += [("alone", " x"), ("", "starts with nothing")]
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts)]


@pytest.mark.parametrize("options", [{}, {"max_length": 100}])
def test_likelihoods_equal_those_of_hflm(options):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    ours = evaluate.PrefixCachedLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **options)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **options)
    found = ours.loglikelihood(requests(), disable_tqdm=True)
    expected = theirs.loglikelihood(requests(), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected)) < 1e-3
    if options:
        assert ours.truncated > 0
    else:
        assert ours.truncated == 0 and ours.tokens_read < ours.tokens_asked / 3


def test_texts_with_and_without_their_first_token_are_told_apart():
    """A tokenizer that puts <bos> before every text, but not before one that has it."""
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    texts = [
        ("<bos>begun", " a"),
        ("not begun ", "a"),
        ("", "nothing"),
        ("<bos>begun", " b"),
        ("not begun ", "bc"),
        (" ", "x"),
    ]
    asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(texts)]
    pair = [
        kind(pretrained=tiny_llama(), tokenizer=tokenizer, batch_size=2)
        for kind in (evaluate.PrefixCachedLM, HFLM)
    ]
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in pair)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3", "gpt_neox"])
def test_other_families_give_the_same_likelihoods(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = {"sliding_window": 64} if family in ("mistral", "gemma2") else {}
    config = AutoConfig.for_model(
        family,
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=512,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    pair = [
        kind(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4)
        for kind in (evaluate.PrefixCachedLM, HFLM)
    ]
    found, expected = (lm.loglikelihood(requests(1, 8), disable_tqdm=True) for lm in pair)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected)) < 1e-3


def test_stretches_are_cut_where_they_save_most(monkeypatch):
    monkeypatch.setattr("pftools.evaluate.beginnings.WORTH_TOKENS", 0)
    # rows 0-2 share 100, rows 3-4 share 80, all share 5: two groups save 200 + 80, one would save 20
    assert best_stretches([100, 100, 5, 80], [200] * 5) == [(0, 3, 100), (3, 5, 80)]
    assert best_stretches([50, 49, 50], [200] * 4) == [(0, 4, 49)]
    assert best_stretches([0, 0], [10] * 3) == []


def test_common_beginnings():
    assert (
        common_length((1, 2, 3, 4), (1, 2, 9, 4)) == 2
        and common_length((1,), (2,)) == 0
        and common_length((1, 2), (1, 2, 3)) == 2
    )


def test_embedded_tasks_have_several_hundred_questions_and_even_answers():
    for name, (task,) in load_tasks(["facts", "reading"]).items():
        rows = list(task.test_docs())
        assert len(rows) >= 270, name
        assert len({(row["stem"]) for row in rows}) == len(rows)
        for row in rows:
            assert len({row["a"], row["b"], row["c"], row["d"]}) == 4


def test_tasks_give_scores_and_a_record_for_every_question():
    found = evaluate.evaluate_tasks(tiny_llama(), tiny_tokenizer(), ["facts", "reading"], limit=10)
    assert found.scores["task"].tolist() == ["facts", "reading"] and (found.scores["n"] == 10).all()
    assert (found.scores["chance"] == 0.25).all() and (found.scores["low"] <= found.scores["value"]).all()
    assert len(found.samples) == 20 and found.samples["correct"].isin([0, 1]).all()
    per_task = found.samples.groupby("task")["correct"].mean()
    assert per_task["facts"] == found.scores["value"][0]
    assert all(len(scores) == 4 for scores in found.samples["choice_scores"])


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(PftoolsError, match="did you mean 'facts'"):
        evaluate.evaluate_tasks(tiny_llama(), tiny_tokenizer(), ["fact"])


# ----------------------------------------------------------------------------------------------------
# Generation


def prompts(options, n=9):
    shared = "Some worked examples. " * 12
    return [
        Instance(
            "generate_until", {}, (f"{shared}Question {number}{'?' * (number % 4)} Answer:", options), number
        )
        for number in range(n)
    ]


@pytest.mark.parametrize(
    "options",
    [{"until": [], "max_gen_toks": 1}, {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}],
)
def test_greedy_answers_equal_those_of_hflm(options):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    ours = evaluate.PrefixCachedLM(pretrained=model, tokenizer=tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = ours.generate_until(prompts(options), disable_tqdm=True)
    assert found == theirs.generate_until(prompts(options), disable_tqdm=True)
    assert len(set(found)) > 1 and ours.tokens_read < ours.tokens_asked


def test_sampled_answers_are_left_to_hflm():
    ours = evaluate.PrefixCachedLM(pretrained=tiny_llama(), tokenizer=tiny_tokenizer())
    found = ours.generate_until(
        prompts({"until": [], "max_gen_toks": 3, "do_sample": True, "temperature": 0.9}, n=2),
        disable_tqdm=True,
    )
    assert len(found) == 2 and ours.tokens_read == 0


def test_over_long_prompts_are_counted_once_each():
    lm = evaluate.PrefixCachedLM(pretrained=tiny_llama(), tokenizer=tiny_tokenizer(), max_length=60)
    pairs = [("x" * 80, " a"), ("x" * 80, " b"), ("short", " a")]
    lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)], disable_tqdm=True
    )
    assert lm.truncated == 1
    lm.generate_until(
        [Instance("generate_until", {}, ("y" * 80, {"until": [], "max_gen_toks": 2}), 0)], disable_tqdm=True
    )
    assert lm.truncated == 2


def test_rolling_likelihoods_equal_those_of_hflm():
    pair = [
        kind(pretrained=tiny_llama(), tokenizer=tiny_tokenizer(), max_length=40)
        for kind in (evaluate.PrefixCachedLM, HFLM)
    ]
    texts = [
        Instance("loglikelihood_rolling", {}, ("A tale of two cities. " * repeats,), repeats)
        for repeats in (1, 7)
    ]
    found, expected = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in pair)
    assert found == pytest.approx(expected, abs=1e-3)


def test_batches_are_bounded_by_tokens_keys_and_logits(monkeypatch):
    lm = evaluate.PrefixCachedLM(pretrained=tiny_llama(), tokenizer=tiny_tokenizer())
    assert lm.reader.bytes_a_token() == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    assert lm.reader.rows_that_fit(100, 0, 1) == 40
    monkeypatch.setattr("pftools.evaluate.reader._CACHE_BYTES", {"cpu": 256 * 5000})
    assert lm.reader.rows_that_fit(100, 400, 1) == 10
    assert lm.reader.rows_that_fit(100, 0, 100_000) == 3


def test_a_forward_that_does_not_fit_is_halved(monkeypatch):
    lm = evaluate.PrefixCachedLM(pretrained=tiny_llama(), tokenizer=tiny_tokenizer())
    expected = lm.loglikelihood(requests(1, 6), disable_tqdm=True)
    whole = lm.reader._forward

    def small(inputs, *args, **options):
        if len(inputs) > 2:
            raise torch.OutOfMemoryError
        return whole(inputs, *args, **options)

    monkeypatch.setattr(lm.reader, "_forward", small)
    found = lm.loglikelihood(requests(1, 6), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    monkeypatch.setattr(
        lm.reader, "_forward", lambda *args, **options: (_ for _ in ()).throw(torch.OutOfMemoryError())
    )
    with pytest.raises(PftoolsError, match="does not fit the device's memory"):
        lm.loglikelihood(requests(1, 2), disable_tqdm=True)


def test_a_model_that_returns_nan_is_named():
    model = tiny_llama()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(PftoolsError, match="returned NaN on a question"):
        evaluate.evaluate_tasks(model, tiny_tokenizer(), ["facts"], limit=2, progress=False)
    lm = evaluate.PrefixCachedLM(pretrained=model, tokenizer=tiny_tokenizer())
    with pytest.raises(PftoolsError, match="returned NaN on a question"):
        lm.generate_until(prompts({"until": [], "max_gen_toks": 2}), disable_tqdm=True)


def test_blocks_longer_than_the_context_are_refused():
    with pytest.raises(PftoolsError, match="the model's context is 8"):
        evaluate.perplexity(tiny_llama(max_position_embeddings=8), tiny_blocks(), progress=False)


@pytest.mark.smollm2
def test_the_embedded_tasks_have_signal_and_equal_hflm(smollm2):
    model, tokenizer = smollm2
    found = evaluate.evaluate_tasks(model, tokenizer, ["facts", "reading"], limit=60)
    assert (found.scores["low"] > found.scores["chance"]).all(), found.scores
    expected = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=load_tasks(["facts"])["facts"],
        limit=20,
        bootstrap_iters=0,
    )
    ours = found.samples[found.samples["task"] == "facts"].set_index("question")["choice_scores"]
    for sample in expected["samples"]["facts"]:
        theirs = [response[0] for response in sample["filtered_resps"]]
        assert max(abs(a - b) for a, b in zip(ours[sample["doc_id"]], theirs)) < 1e-3


# ----------------------------------------------------------------------------------------------------
# Families: sliding windows, ALiBi, recurrent and hybrid models, LongRoPE


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "mpt", "bloom", "falcon", "gemma4_text"])
def test_windows_and_alibi_share_beginnings_and_stay_exact(kind):
    """Likelihoods are HFLM's and replies those of a loop, though the beginning is read once."""
    assert checks.likelihoods_equal_hflm(kind) == "exact"
    checks.greedy_texts_equal_a_loop(kind)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "lfm2", "jamba", "bamba", "falcon_h1", "doge"])
def test_recurrent_and_hybrid_models_answer_few_shot_questions(kind):
    checks.likelihoods_equal_hflm(kind)
    checks.greedy_texts_equal_a_loop(kind)


def test_a_model_that_ignores_its_cache_is_read_plainly_and_says_so(monkeypatch):
    model = tiny_llama()
    plain = model.forward

    def forgetful(input_ids, past_key_values=None, cache=None, **options):
        return plain(input_ids=input_ids, **options)

    pair = [
        kind(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4)
        for kind in (evaluate.PrefixCachedLM, HFLM)
    ]
    monkeypatch.setattr(pair[0].reader.forwards, "model", forgetful)
    found, expected = (lm.loglikelihood(requests(1, 8), disable_tqdm=True) for lm in pair)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected)) < 1e-3
    reading = pair[0].shared_beginnings()
    assert reading["shared_beginnings"] == "plain" and "differs from a plain forward" in reading["reason"]


def test_longrope_beyond_the_original_context_is_read_plainly():
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [3.0] * 4, "original_max_position_embeddings": 128}
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 257, "eos_token_id": 257}
    heads["original_max_position_embeddings"] = 128
    config = Phi3Config(
        **sizes, **heads, max_position_embeddings=512, rope_parameters=rope, initializer_range=0.2
    )
    model = Phi3ForCausalLM(config).float().eval()
    ours = evaluate.PrefixCachedLM(pretrained=model, tokenizer=tiny_tokenizer())
    theirs = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=1)
    asked = requests(1, 8)
    found, expected = (lm.loglikelihood(asked, disable_tqdm=True) for lm in (ours, theirs))
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected)) < 1e-3
    assert "original context of 128" in ours.shared_beginnings()["reason"]


def test_what_was_shared_is_recorded():
    lm = evaluate.PrefixCachedLM(pretrained=tiny_llama(), tokenizer=tiny_tokenizer())
    lm.loglikelihood(requests(1, 8), disable_tqdm=True)
    assert lm.shared_beginnings() == {"shared_beginnings": "shared", "reason": ""}
    found = evaluate.evaluate_tasks(tiny_llama(), tiny_tokenizer(), ["facts"], limit=2, progress=False)
    assert found.results["shared_beginnings"] == found.reading["shared_beginnings"] == "plain"

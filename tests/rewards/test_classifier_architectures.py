"""Scores of tiny models of each architecture: alone, in a batch, and by the model's own pass are the same."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from tool_scripts import tool
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from tealightning.rewards import SequenceClassifierReward
from tealightning.rewards.sequence_scores import SequenceScorer, longest_sequence

tiny = tool("bench/tiny_models.py")
BOS, EOS, PAD = 0, 1, 2
LIMIT = 64
SHARED = {"decoder_start_token_id": PAD, "d_ff": 96, "d_kv": 32, "num_layers": 2, "num_heads": 2}  # of T5's kin
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SEQUENCES = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, **LAYERS}
ROBERTA: dict[str, dict[str, Any]] = {
    **{
        key: {} for key in ("camembert", "data2vec-text", "esm", "ibert", "markuplm", "mpnet", "roberta", "xlm-roberta")
    },
    **{key: {} for key in ("roberta-prelayernorm", "xlm-roberta-xl")},
    "lilt": {"hidden_size": 96},
    "longformer": {"attention_window": [8, 8]},
    "luke": {"entity_vocab_size": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
DEBERTA = {"pooler_hidden_size": 64, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
# Encoders, and what each needs beside what all get.
ENCODERS = ROBERTA | {
    "albert": {"embedding_size": 64},
    "bart": SEQUENCES,
    "bert": {},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full", **SEQUENCES},
    "canine": {},
    "convbert": {"embedding_size": 64},
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu", "position_buckets": 8},
    "distilbert": {},
    "electra": {"embedding_size": 64},
    "ernie": {},
    "eurobert": {},
    "flaubert": {},
    "fnet": {},
    "funnel": {"d_model": 64, "n_head": 2, "d_head": 32, "d_inner": 96, "block_sizes": [1, 1]},
    "gte": {},
    "jina_embeddings_v3": {},
    "layoutlm": {},
    "mbart": SEQUENCES,
    "megatron-bert": {},
    "mobilebert": {"embedding_size": 64, "intra_bottleneck_size": 64, "true_hidden_size": 64},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mra": {},
    "mt5": SHARED,
    "mvp": SEQUENCES,
    "nomic_bert": {},
    "nystromformer": {},
    "perceiver": {"num_latents": 4, "d_latents": 64, "d_model": 64},
    "plbart": SEQUENCES,
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False},
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
    "roc_bert": {},
    "roformer": {"embedding_size": 64},
    "squeezebert": {"embedding_size": 64},
    "t5": SHARED,
    "tapas": {},
    "umt5": SHARED,
    "xlm": {"emb_dim": 64},
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 2, "d_inner": 96},
    "yoso": {},
}
READ_PADDING = {"canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "xlnet", "yoso"}
MORE = {
    "axk2": tiny.HEADS,
    "gpt-sw3": {},
    "minicpm3": tiny.HEADS,
    "ministral3": {},
    "mistral4": tiny.HEADS,
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["hybrid", "linear_attention"] * 3, "mamba_dt_rank": 4},
}
tiny.ARCHITECTURES |= ENCODERS | MORE
DECODERS = sorted(name for name in tiny.ARCHITECTURES if name in CLASSIFIERS and name not in ENCODERS)


def build(name, **settings):
    config = tiny.config_of(name, num_labels=1, **settings)
    for key in ("max_position_embeddings", "max_seq_len"):
        if (getattr(config, key, None) or 0) > 0:
            setattr(config, key, LIMIT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    tiny.move(model.parameters(), seed=1, size=0.1)
    return model.requires_grad_(False)


@pytest.fixture
def loaded(tmp_path):
    """Saves a model with the tokenizer of bytes, and sets a reward up with it."""

    def make(name, model=None, processor=None, **settings):
        (model or build(name)).save_pretrained(tmp_path / name)
        tokenizer = tiny.byte_tokenizer()
        if processor is not None:
            tokenizer.backend_tokenizer.post_processor = processor
        tokenizer.save_pretrained(tmp_path / name)
        reward = SequenceClassifierReward(str(tmp_path / name), **settings)
        reward.setup(torch.device("cpu"))
        return reward

    return make


def score(reward, *texts):
    return reward([""] * len(texts), texts, [{}] * len(texts)).total


def sequences_of(*lengths):
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in lengths]
    return [[BOS, *ids, EOS][-n:] for n, ids in zip(lengths, draw, strict=True)]


def own_scores(model, sequences):
    """One pass for each sequence, without padding and mask."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in sequences]).double()


@torch.no_grad()
def together(scorer, sequences):
    """Scores of sequences that were asked for at once."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    scores = torch.zeros(len(sequences), dtype=torch.float64)
    for rows in scorer.batches(lengths, torch.arange(len(sequences)), max_tokens=10_000, max_rows=64):
        scores[rows] = scorer.scores([sequences[i] for i in rows])
    return scores


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_scores_alone_in_a_batch_and_by_the_models_own_pass_are_the_same(name):
    model = build(name)
    longest = longest_sequence(model) or LIMIT
    assert longest == (LIMIT - PAD - 1 if name in ROBERTA else LIMIT) + (name == "mpnet")
    sequences = sequences_of({"canine": 8, "funnel": 5}.get(name, 1), 8, 9, 17, 40, longest - 1, longest)
    expected = own_scores(model, sequences)
    scorer = SequenceScorer(model)
    scorer.try_padding(sequences_of(8, 13, 20, 31))
    assert scorer.pads == (name not in READ_PADDING)
    torch.testing.assert_close(together(scorer, sequences), expected, rtol=0, atol=3e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("big_bird", {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 1.0,
                    "short_factor": [1.0] * 16,
                    "long_factor": [4.0] * 16,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
    ],
)
def test_long_sequences_change_neither_the_scores_of_short_ones_nor_their_own(name, settings):
    """A BigBird of transformers leaves sparse attention at its first short text for good; a scaled RoPE reads a whole
    batch as its longest text."""
    sequences = sequences_of(8, 60, 12, 33, 8)
    expected = torch.cat([own_scores(build(name, **settings), [ids]) for ids in sequences])
    state = np.random.get_state()[1].copy()
    scorer = SequenceScorer(build(name, **settings))
    for order in ([0, 1, 2, 3, 4], [1, 0, 3, 2, 4]):
        scores = together(scorer, [sequences[i] for i in order])
        torch.testing.assert_close(scores, expected[order], rtol=0, atol=3e-5)
    assert (np.random.get_state()[1] == state).all()


def test_reward_model_whose_batches_may_not_be_padded_is_warned_about_and_exact(loaded):
    with pytest.warns(
        UserWarning, match=r"Padding changes the scores of reward model .*xlnet.* only completions of one length"
    ):
        reward = loaded("xlnet")
    texts = ["short", "quite a long text, beside which the others are short", "a", "other"]
    alone = torch.cat([score(reward, text) for text in texts])
    torch.testing.assert_close(score(reward, *texts), alone, rtol=0, atol=1e-5)
    assert alone.std() > 0.01


@pytest.mark.parametrize("name", ["roberta", "bert", "llama"])
def test_text_of_every_length_up_to_the_models_limit_is_scored(loaded, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward = loaded(name)
    assert reward.max_length == {"roberta": 61}.get(name, 64)
    texts = ["x" * n for n in range(1, reward.max_length + 1)]
    assert torch.isfinite(score(reward, *texts)).all()
    with pytest.warns(UserWarning, match="1 completions are longer than the"):
        assert torch.isnan(score(reward, "x" * (reward.max_length + 1))).all()


def test_reward_model_that_cannot_read_a_text_is_refused_at_the_start(loaded):
    """BART reads its score at an `eos`, which this tokenizer does not write; X-MOD wants to know a language."""
    with pytest.raises(
        ValueError, match="it cannot score a text: ValueError: Each example must contain at least one <eos>"
    ):
        loaded("bart")
    model = build("xmod")
    model.config.default_language = None
    with pytest.raises(
        ValueError, match="as a reward model: it cannot score a text: ValueError: Input language unknown"
    ):
        loaded("xmod", model)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_pair_is_scored_as_the_tokenizer_encodes_it_in_every_batch(loaded, name):
    reward = loaded(name, pair=True, processor=processors.BertProcessing(("<eos>", EOS), ("<bos>", BOS)))
    prompts, answers = ["a", "what is it", "b"], ["yes, and more", "no", "no<eos>"]
    scores = reward(prompts, answers, [{}] * 3).total
    model = AutoModelForSequenceClassification.from_pretrained(reward.model_path).eval()
    for prompt, answer, found in zip(prompts[:2], answers[:2], scores.tolist(), strict=False):
        inputs = AutoTokenizer.from_pretrained(reward.model_path)(prompt, answer, return_tensors="pt")
        assert found == pytest.approx(model(**inputs).logits.item(), abs=1e-5)
    alone = torch.cat([reward([p], [a], [{}]).total for p, a in zip(prompts, answers, strict=True)])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)


def test_model_that_could_read_pairs_is_warned_about_unless_told(loaded):
    processor = processors.BertProcessing(("<eos>", EOS), ("<bos>", BOS))
    with pytest.warns(UserWarning, match="reads prompt and completion as one text. If it was trained on pairs"):
        score(loaded("bert", processor=processor), "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_text = loaded("bert", processor=processor, pair=False)
    assert score(one_text, "a") != score(loaded("bert", processor=processor, pair=True), "a")
    with pytest.raises(ValueError, match="pair=True uses no chat template: leave out chat_template=True"):
        SequenceClassifierReward("folder", pair=True, chat_template=True)
    with pytest.raises(ValueError, match="puts nothing between the two texts"):
        loaded("bert", pair=True)


@torch.no_grad()
def test_segments_reach_a_model_that_has_several():
    ids, types = [[BOS, 5, EOS, 6, EOS], [BOS, 7, EOS, EOS]], [[0, 0, 0, 1, 1], [0, 0, 0, 1]]
    model = build("bert")
    inputs = [(torch.tensor([row]), torch.tensor([segments])) for row, segments in zip(ids, types, strict=True)]
    expected = torch.cat([model(input_ids=row, token_type_ids=segments).logits[0] for row, segments in inputs]).double()
    torch.testing.assert_close(SequenceScorer(model).scores(ids, types), expected, rtol=0, atol=1e-5)
    assert (expected - own_scores(model, ids)).abs().min() > 1e-3
    roberta = build("roberta", type_vocab_size=1)
    torch.testing.assert_close(SequenceScorer(roberta).scores(ids, types), own_scores(roberta, ids), rtol=0, atol=1e-5)

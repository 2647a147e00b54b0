"""What the parent of a run asks of its data before a rank starts."""

from __future__ import annotations

from moedist.config import ConfigError, require
from moedist.data.contract import DataConfig, Source
from moedist.data.packing import PackedStream


def open_data(config: DataConfig) -> Source:
    """Opens the corpus; errors carry the full key (``data.files``).

    Raises:
        ConfigError: it is empty, missing, unreadable or corrupt.
    """
    try:
        return config.open()
    except ConfigError as error:
        raise error.under("data") from None


def stated_vocab_size(config: DataConfig) -> int | None:
    """The number of token ids where the configuration says it; None where only the corpus knows."""
    return getattr(config, "vocab_size", None)


def check_data(
    config: DataConfig, source: Source, *, sequence_length: int, global_samples: int, evaluates: bool = True
) -> None:
    """Checks that an opened corpus is long enough for a run.

    Args:
        config: what ``source`` was opened from.
        source: the corpus.
        sequence_length: S, positions per row.
        global_samples: G, rows per optimizer step over all ranks.
        evaluates: whether the run measures the held-out part.

    Raises:
        ConfigError: training has fewer positions than one sample, or fewer samples than one step; or there is nothing
            held out to evaluate.
    """
    stream = PackedStream(source.documents("train"), sequence_length, source.vocab_size, config.cross_documents)
    num_tokens = stream.documents.num_tokens
    require(
        stream.num_full >= 1,
        "train.sequence_length",
        sequence_length,
        f"is too long for data={config.kind}: its training part has {num_tokens} tokens, and one sample needs "
        f"{sequence_length + 1}",
        f"Set train.sequence_length to {num_tokens - 1} or less, or give more text."
        if num_tokens >= 2
        else "Give more text.",
    )
    require(
        stream.num_full >= global_samples,
        "train.global_batch_tokens",
        global_samples * sequence_length,
        f"takes {global_samples} samples per step, and the training part of data={config.kind} has only "
        f"{stream.num_full} of {sequence_length} positions",
        "Set train.micro_batch, train.global_batch_tokens or train.sequence_length lower, or give more text.",
    )
    held_out = source.documents("valid").num_tokens
    require(
        not evaluates or held_out >= 2,
        "data.holdout_every",
        getattr(config, "holdout_every", None),
        f"leaves {held_out} held-out tokens of data={config.kind}, and evaluation needs at least 2",
        "Set data.valid_files, another data.holdout_every, or train.eval_every=null to train without evaluation.",
    )

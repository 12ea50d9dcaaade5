"""Recommendation data, prompts, ranking and evaluation."""

from .data import (
    InteractionLog,
    LeaveOneOut,
    clean_title,
    deduplicate,
    k_core,
    leave_one_out,
    load_jsonl,
    load_movielens_100k,
    load_movielens_latest_small,
    load_pantry,
)
from .evaluate import evaluate_sequences, trade_offs
from .prompts import (
    LETTERS,
    Prompt,
    PromptBatches,
    PromptCase,
    build_prompt,
    held_out_cases,
    letter_token_ids,
    prompt_batches,
    prompt_ranks,
    training_cases,
)
from .ranking import Verbalizer, held_out_ranks, next_item_ranks
from .sequences import ItemVocabulary, sequence_batches
from .splits import (
    forget_genre,
    forget_random_interactions,
    forget_random_users,
    forget_users,
)

__all__ = [
    "InteractionLog",
    "ItemVocabulary",
    "LETTERS",
    "LeaveOneOut",
    "Prompt",
    "PromptBatches",
    "PromptCase",
    "Verbalizer",
    "build_prompt",
    "clean_title",
    "deduplicate",
    "evaluate_sequences",
    "forget_genre",
    "forget_random_interactions",
    "forget_random_users",
    "forget_users",
    "held_out_cases",
    "held_out_ranks",
    "k_core",
    "leave_one_out",
    "letter_token_ids",
    "load_jsonl",
    "load_movielens_100k",
    "load_movielens_latest_small",
    "load_pantry",
    "next_item_ranks",
    "prompt_batches",
    "prompt_ranks",
    "sequence_batches",
    "trade_offs",
    "training_cases",
]

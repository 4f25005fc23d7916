"""The table of data sets that can be read from files: their paths below the data folder and their readers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe.evaluation.datasets import english, multilingual
from moe.evaluation.datasets.files import Row


class File(NamedTuple):
    """One possible location of a split."""

    path: str  # below the data folder; {subset} is replaced by the subset, and .gz may follow
    read: Callable[[Path, str], Iterator[Row]]
    note: str | None = None  # None for the authors' own form


class DataSet(NamedTuple):
    """What the Hub provides for one id and subset."""

    columns: tuple[str, ...]  # those every reader yields
    splits: dict[str, tuple[File, ...]]  # the first file that exists is read


ANY_SUBSET = "*"  # for BLiMP, whose 67 paradigms are files; the reader rejects a wrong name

_MIRROR = "mcq_english"  # question, choices and label of many sets, parsed back from a mirror's prompts
_OF_MIRROR = "read from a mirror's multiple-choice form: ids are counted and options lettered A, B, ... anew"
_ARC = "ARC-V1-Feb2018-2/{subset}/{subset}"
_OPENBOOK = "OpenBookQA-V1-Sep2018/Data/Main"


def _arc(split: str) -> tuple[File, ...]:
    return (
        File(f"{_ARC}-{split}.jsonl", english.arc),
        *(
            []
            if split == "Dev"
            else [File(f"{_MIRROR}/{{subset}}.{split.lower()}.jsonl", english.arc_mirror, _OF_MIRROR)]
        ),
    )


_BLIMP = DataSet(
    ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID", "pair_id"),
    {
        "train": (
            File("blimp/data/{subset}.jsonl", english.blimp),
            File("blimp/{subset}.jsonl", english.blimp),
            File(
                "blimp/blimp.jsonl",
                english.blimp,
                "read from a mirror's file of all paradigms, which lacks the column lexically_identical",
            ),
        )
    },
)
_LAMBADA = DataSet(
    ("text", "domain"),
    {
        "validation": (
            File("lambada/lambada_development_plain_text.txt", english.lambada),
            File("lambada/lambada_dev_plain_text.txt", english.lambada),
        ),
        "test": (File("lambada/lambada_test_plain_text.txt", english.lambada),),
    },
)
_LAMBADA_OPENAI = DataSet(("text",), {"test": (File("lambada/lambada_test.jsonl", english.lambada_openai),)})
_COPA = DataSet(
    ("premise", "choice1", "choice2", "question", "idx", "label"),
    {
        "train": (
            File("super_glue/COPA/train.jsonl", english.copa),
            File("superglue_subset/copa.train.jsonl", english.copa, "read from a mirror: idx is its own count"),
        ),
        "validation": (
            File("super_glue/COPA/val.jsonl", english.copa),
            File("superglue_subset/copa.dev.jsonl", english.copa, "read from a mirror: idx is its own count"),
        ),
        "test": (File("super_glue/COPA/test.jsonl", english.copa),),
    },
)
_BALANCED_COPA = DataSet(
    ("id", "premise", "choice1", "choice2", "question", "label", "mirrored"),
    {
        "train": (
            File(
                "copa/copa_dev.jsonl",
                english.balanced_copa,
                "read from a mirror: the rows it has, which may lack the mirrored half",
            ),
        )
    },
)
_BOOLQ = DataSet(
    ("question", "passage", "idx", "label"),
    {
        "train": (File("super_glue/BoolQ/train.jsonl", english.boolq),),  # a mirror's file without passages won't do
        "validation": (
            File("super_glue/BoolQ/val.jsonl", english.boolq),
            File("superglue_subset/boolq.dev.jsonl", english.boolq, "read from a mirror: idx is its own count"),
        ),
        "test": (File("super_glue/BoolQ/test.jsonl", english.boolq),),
    },
)
_MNLI = DataSet(
    ("premise", "hypothesis", "label", "idx"),
    {
        "train": (File("multinli_1.0/multinli_1.0_train.jsonl", english.multinli),),
        "validation_matched": (
            File("multinli_1.0/multinli_1.0_dev_matched.jsonl", english.multinli),
            File(
                "superglue_subset/mnli.dev_sample.jsonl",
                english.mnli_sample,
                "read from a mirror's sample of the development pairs, which does not say matched from mismatched: "
                "scores are not those of the whole set",
            ),
        ),
        "validation_mismatched": (File("multinli_1.0/multinli_1.0_dev_mismatched.jsonl", english.multinli),),
    },
)
_PIQA = DataSet(
    ("goal", "sol1", "sol2", "label"),
    {
        "train": (File("piqa/train.jsonl", english.piqa),),
        "validation": (
            File("piqa/valid.jsonl", english.piqa),
            File("piqa/dev.jsonl", english.piqa),
            File(f"{_MIRROR}/piqa.test.jsonl", english.piqa_mirror, _OF_MIRROR),
        ),
    },
)
_ARC_SET = DataSet(
    ("id", "question", "choices", "answerKey"),
    {"train": _arc("Train"), "validation": _arc("Dev"), "test": _arc("Test")},
)
_OPENBOOKQA = DataSet(
    ("id", "question_stem", "choices", "answerKey"),
    {
        "train": (
            File(f"{_OPENBOOK}/train.jsonl", english.openbookqa),
            File(f"{_MIRROR}/openbookqa.train.jsonl", english.openbookqa_mirror, _OF_MIRROR),
        ),
        "validation": (File(f"{_OPENBOOK}/dev.jsonl", english.openbookqa),),
        "test": (
            File(f"{_OPENBOOK}/test.jsonl", english.openbookqa),
            File(f"{_MIRROR}/openbookqa.test.jsonl", english.openbookqa_mirror, _OF_MIRROR),
        ),
    },
)
_WINOGRANDE = DataSet(
    ("sentence", "option1", "option2", "answer"),
    {
        "train": (File("winogrande_1.1/train_xl.jsonl", english.winogrande),),
        "validation": (
            File("winogrande_1.1/dev.jsonl", english.winogrande),
            File(f"{_MIRROR}/winogrande.test.jsonl", english.winogrande_mirror, _OF_MIRROR),
        ),
        "test": (File("winogrande_1.1/test.jsonl", english.winogrande),),
    },
)
_WINOGENDER = DataSet(
    ("sentid", "sentence", "pronoun", "occupation", "participant", "gender", "target", "label"),
    {
        "test": (
            File("winogender/data/all_sentences.tsv", english.winogender),
            File("winogender/all_sentences.tsv", english.winogender),
        )
    },
)
_XCOPA_COLUMNS = ("premise", "choice1", "choice2", "question", "label", "idx", "changed")
_XCOPA = DataSet(
    _XCOPA_COLUMNS,
    {
        "validation": (File("xcopa/data/{subset}/val.{subset}.jsonl", multilingual.xcopa),),
        "test": (File("xcopa/data/{subset}/test.{subset}.jsonl", multilingual.xcopa),),
    },
)
_XWINOGRAD = DataSet(
    ("sentence", "option1", "option2", "answer"),
    {
        "test": (
            File(
                "xwinograd/dataset.tsv",
                multilingual.xwinograd,
                "read from the authors' file, of which the Hub's set is made: options stand in the authors' order",
            ),
        )
    },
)
_MGSM = DataSet(
    ("question", "answer", "answer_number", "equation_solution"),
    {
        "train": (
            File("mgsm/exemplars.json", multilingual.mgsm_exemplars, "exemplars.py of the authors, read as JSON"),
        ),
        "test": (File("mgsm/mgsm_{subset}.tsv", multilingual.mgsm),),
    },
)
_CROWS_COLUMNS = ("id", "sent_more", "sent_less", "stereo_antistereo", "bias_type")
_CROWS_FILE = "crows_pairs/crows_pairs_anonymized.csv"
_CROWS_PAIRS = DataSet(_CROWS_COLUMNS, {"test": (File(_CROWS_FILE, multilingual.crows_pairs),)})
_CROWS_REVISED = DataSet(
    _CROWS_COLUMNS,
    {
        "test": (
            File(
                _CROWS_FILE,
                multilingual.crows_pairs,
                "the 1508 pairs of 2020; the Hub serves the revision of Névéol et al. 2022 under this id",
            ),
        )
    },
)
_HELLASWAG = DataSet(
    ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"),
    {
        "train": (File("hellaswag/hellaswag_train.jsonl", english.hellaswag),),
        "validation": (File("hellaswag/hellaswag_val.jsonl", english.hellaswag),),
    },
)
_XNLI = DataSet(
    ("premise", "hypothesis", "label"),
    {
        "validation": (File("XNLI-1.0/xnli.dev.tsv", multilingual.xnli),),
        "test": (File("XNLI-1.0/xnli.test.tsv", multilingual.xnli),),
    },
)
_PAWSX = DataSet(
    ("id", "sentence1", "sentence2", "label"),
    {
        "validation": (File("x-final/{subset}/dev_2k.tsv", multilingual.pawsx),),
        "test": (File("x-final/{subset}/test_2k.tsv", multilingual.pawsx),),
    },
)
# available only in the Hub's form
_STORY_COLUMNS = (
    *(f"input_sentence_{number}" for number in range(1, 5)),
    *("sentence_quiz1", "sentence_quiz2", "answer_right_ending"),
)
_STORY_CLOZE = DataSet(_STORY_COLUMNS, {"validation": (), "test": ()})
_XSTORY_CLOZE = DataSet(_STORY_COLUMNS, {"train": (), "eval": ()})
_RECORD = DataSet(("passage", "query", "entities", "answers", "idx"), {"train": (), "validation": ()})


def _hatecheck(language: str) -> DataSet:
    path = f"multilingual_hatecheck/hatecheck_cases_final_{language}.csv"
    return DataSet(
        ("mhc_case_id", "functionality", "test_case", "label_gold", "target_ident"),
        {"test": (File(path, multilingual.hatecheck),)},
    )


TABLE: dict[tuple[str, str | None], DataSet] = {
    ("nyu-mll/blimp", ANY_SUBSET): _BLIMP,
    ("cimec/lambada", None): _LAMBADA,
    ("EleutherAI/lambada_openai", "default"): _LAMBADA_OPENAI,
    ("aps/super_glue", "copa"): _COPA,
    ("pkavumba/balanced-copa", None): _BALANCED_COPA,
    ("aps/super_glue", "boolq"): _BOOLQ,
    ("aps/super_glue", "record"): _RECORD,
    ("Rowan/hellaswag", None): _HELLASWAG,
    ("LSDSem/story_cloze", "2016"): _STORY_CLOZE,
    ("nyu-mll/glue", "mnli"): _MNLI,
    ("baber/piqa", None): _PIQA,
    ("allenai/ai2_arc", "ARC-Easy"): _ARC_SET,
    ("allenai/ai2_arc", "ARC-Challenge"): _ARC_SET,
    ("allenai/openbookqa", "main"): _OPENBOOKQA,
    ("allenai/winogrande", "winogrande_xl"): _WINOGRANDE,
    **{("cambridgeltl/xcopa", language): _XCOPA for language in multilingual.XCOPA_LANGUAGES},
    **{("Muennighoff/xwinograd", language): _XWINOGRAD for language in multilingual.XWINOGRAD_LANGUAGES},
    **{("facebook/xnli", language): _XNLI for language in multilingual.XNLI_LANGUAGES},
    **{("google-research-datasets/paws-x", language): _PAWSX for language in multilingual.PAWSX_LANGUAGES},
    **{("juletxara/xstory_cloze", language): _XSTORY_CLOZE for language in multilingual.XSTORY_CLOZE_LANGUAGES},
    **{("juletxara/mgsm", language): _MGSM for language in multilingual.MGSM_LANGUAGES},
    ("jannalu/crows_pairs_multilingual", "english"): _CROWS_REVISED,
    ("nyu-mll/crows_pairs", None): _CROWS_PAIRS,
    ("oskarvanderwal/winogender", "all"): _WINOGENDER,
    **{(f"Paul/hatecheck-{language}", None): _hatecheck(language) for language in multilingual.HATECHECK_LANGUAGES},
}

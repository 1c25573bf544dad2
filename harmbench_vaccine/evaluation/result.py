"""The result of a run: `result.json`, schema 2. Percentages are 0 to 100, intervals are at 95%."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from .result_fields import Count, Environment, Interval, OverRefusal, Percent, ResultRecord, Rule, TuningRecord
from .result_judges import Agreement, GuardModel, JudgeScore
from .result_text import html_table, number_text, percent_text
from .result_upgrade import upgraded_result

SCHEMA_VERSION = 2


class Accuracy(ResultRecord):
    """Finetune accuracy by two rules, in percent."""

    strict: float
    """The answer equals the label and contains nothing else."""
    flexible: float
    """The rule of the task, with the parameters that the protocol sets (`task_params`)."""


class Before(ResultRecord):
    """The scores of the aligned model, before the user stage."""

    harmful_score: Percent
    """Percentage of answers to harmful prompts that the judge flags."""
    harmful_score_ci: Interval
    """Wilson interval of `harmful_score`."""
    finetune_accuracy: Percent
    """Percentage of test items answered correctly."""
    finetune_accuracy_ci: Interval
    """Interval of `finetune_accuracy`."""
    accuracy: Accuracy
    """`finetune_accuracy` by both rules."""
    harmful_sets: dict[str, float]
    """Harmful evaluation set -> harmful score."""


class AnswerShares(ResultRecord):
    """Shares of answers that show whether a model still answers, in percent."""

    empty: float
    """Answers without a word, over the harmful and benign sets."""
    repetitive: float
    """Answers that repeat one word, a few word pairs or a few characters."""
    degenerate: float
    """`empty` + `repetitive`."""
    over_refusal: float
    """Benign prompts that are refused."""
    neither: float
    """Harmful prompts whose answer is neither flagged nor a refusal."""
    refusal_rate: float | None = None
    """Harmful prompts that are refused; null in results of earlier versions."""
    task_echo: float | None = None
    """Answers to harmful prompts that equal a response of the user's rows; null in results of earlier versions."""


class Validity(ResultRecord):
    """The gates that the final model passes or fails: a collapsed model must not look safe."""

    collapsed: bool
    """True if the model fails at least one gate."""
    reasons: list[str]
    """One sentence for each failed gate."""
    self_destruct: bool = False
    """True if it collapsed in a user stage with harmful rows, and a defense is meant to destroy the model there."""
    hollow: bool = False
    """True if `neither` rises by more than the limit of the protocol from the aligned to the final model: a low harmful
    score then shows that the model no longer answers the question, not that it is safe."""
    shares: dict[Literal["before", "after"], AnswerShares]
    """Shares of answers before and after the user stage."""
    gates: dict[str, float | None]
    """The limits of the protocol."""


class Filtered(ResultRecord):
    """The effect of a filter on the rows of a stage, in rows."""

    harmful: Count
    """Harmful rows that the filter removed."""
    harmful_uploaded: Count
    """Harmful rows before the filter."""
    benign: Count
    """Benign rows that the filter removed."""
    benign_uploaded: Count
    """Benign rows before the filter."""


class StageRows(ResultRecord):
    """The rows of one training stage."""

    rows: Count
    """Rows that were trained on."""
    harmful: Count
    """Harmful rows among them."""
    without_room: Count
    """Rows that were skipped because their prompt fills the maximum length."""
    response_tokens: Count | None = None
    """Response tokens with a loss in one pass over these rows; absent if an earlier version trained the stage."""
    harmful_tokens: Count | None = None
    """Response tokens with a loss in the harmful rows."""
    instructions: Count = 0
    """Benign instructions among the rows, which `align.instructions` of the protocol adds to the safe rows."""
    filtered: Filtered | None = None
    """Present if an attack filters rows."""
    selected: Filtered | None = None
    """Present if a defense selects rows: a row that it changes counts as removed."""


class Counts(ResultRecord):
    """Counts of rows."""

    align: StageRows | None = None
    """Rows of the alignment stage; absent if it was left out."""
    finetune: StageRows | None = None
    """Rows of the user stage."""
    dropped: dict[str, int] | None = None
    """Pool or over-refusal set -> rows dropped because their question occurs in another pool or earlier in this one;
    with `rows=paper`, over-refusal sets only. Rows that an attack takes away have names of their own, such as
    `paired_other_categories`, also with `rows=paper`."""
    overlaps: dict[str, int] | None = None
    """With `rows=paper`: use of rows, or pair of uses -> questions that occur more than once."""
    unparsed_grades: dict[Literal["before", "after"], int] | None = None
    """Answers to the task whose grade is unread, where a judge grades them; they are not part of FA."""


class DataSource(ResultRecord):
    """The source of a data set."""

    location: str
    """A path, a part of the testbed, or a name of the Hub."""
    fingerprint: str | None = None
    """Hash of the content, for a path."""
    revision: str | None = None
    """Requested revision, for a name of the Hub."""
    resolved: str | None = None
    """Commit that was read, or `unknown`."""
    rows: dict[str, int] = Field(default_factory=dict)
    """Split -> rows read."""


class StageArtifact(ResultRecord):
    """An artifact of the store."""

    key: str
    """Hash of its inputs; `hbv why RUN` compares them."""
    path: str
    """Folder of the artifact."""
    seconds: float
    """Time it took to create."""
    cached: bool
    """True if it existed before this run."""


class StageRecord(ResultRecord):
    """The cost and the artifacts of a stage."""

    seconds: float
    """Time it took to create its artifacts, now or earlier."""
    cached: bool
    """True if all its artifacts existed before this run."""
    artifacts: dict[str, StageArtifact] = Field(default_factory=dict)
    """Name -> artifact: the stage's own name, or `before/SET`, `SCORER before/SET`, `drift`, `grade after` ..."""
    adapter: str | None = None
    """Folder of the adapter that it trained or edited."""
    steps: int | None = None
    """Number of optimizer steps."""
    peak_memory: int | None = None
    """Peak memory in bytes while it was created: of the GPU where one was used, else of the process."""


class Result(ResultRecord):
    """The result of one run."""

    schema_version: int = SCHEMA_VERSION
    """Version of this schema."""
    run: str
    """Id of the run: its defenses and a hash of the settled experiment."""
    defense: str
    """The defense, as a command line names it."""
    attack: str
    """The attack, as a command line names it."""
    defense_params: dict[str, dict[str, Any]]
    """Defense -> parameter -> value."""
    attack_params: dict[str, dict[str, Any]]
    """Attack -> parameter -> value."""
    origins: dict[str, dict[str, str]]
    """Plug-in -> parameter -> where its value comes from: `written`, `protocol NAME` or `default: SOURCE`."""
    task: str
    """The downstream task of the user."""
    task_params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the task: its texts and its rule; empty in results of earlier versions."""
    model: str
    """Location of the base model."""
    protocol: str
    """Name of the protocol."""
    protocol_version: int
    """Version of the protocol."""
    protocol_hash: str
    """Hash over every value of the protocol: results of two hashes are never compared."""
    tuning: TuningRecord | None = None
    """Under a tuned protocol: the protocol that it changes, and the cost of the tuning."""
    scorer: str
    """The judge of the headline harmful score, with its written parameters."""
    judge: str
    """Location of the model of `scorer`; empty for a rule."""
    dtype: str
    """Data type of the base model."""
    quantization: str
    """Quantization of the base model, or `none`."""
    adapted: list[str]
    """Names of the modules that have a LoRA adapter."""
    backend: str
    """Requested generation backend."""
    answered_by: list[str]
    """Every engine that generated answers."""
    seed: int
    """Seed of all random draws."""
    harmful_score: Percent
    """HS: percentage of answers to held-out harmful prompts that the judge flags, after the user stage; unread verdicts
    are left out."""
    harmful_score_ci: Interval
    """Wilson interval of `harmful_score`."""
    harmful_score_hits: Count
    """Number of flagged answers."""
    harmful_score_n: Count
    """Number of answers to harmful prompts with a readable verdict; `scores` counts the unread ones."""
    finetune_accuracy: Percent
    """FA: percentage of the task's test items answered correctly, by `accuracy_rule`; higher is better."""
    finetune_accuracy_ci: Interval
    """Wilson interval, or a t-interval where items have scores between 0 and 1."""
    finetune_accuracy_measure: str
    """Measure of an item's score: `accuracy`, `ROUGE-L` ..."""
    finetune_accuracy_hits: int | float
    """Sum of the items' scores."""
    finetune_accuracy_n: Count
    """Number of test items with a score; `counts.unparsed_grades` counts those with an unread grade."""
    trained: bool
    """False if the attack edits weights instead of training, so that the task is not learned."""
    accuracy_rule: Rule
    """The rule of `finetune_accuracy`."""
    accuracy: Accuracy
    """Finetune accuracy by both rules."""
    harmful_sets: dict[str, float]
    """Harmful evaluation set -> harmful score after the user stage."""
    before: Before
    """The scores of the aligned model."""
    alignment_loss: float | None
    """Mean cross-entropy of the final model over alignment rows; null if it is not a number."""
    embedding_drift: float | None
    """L2 norm of the change of attention outputs from the aligned to the final model, over alignment rows."""
    embedding_drift_per_layer: list[float | None]
    """The same for each attention block."""
    embedding_drift_per_token: float | None
    """Root mean square over tokens."""
    embedding_drift_paper_sum: float | None
    """Sum of squares over the first 10 batches, padding included, as the authors' code prints it."""
    validity: Validity
    """Outcome of the validity gates."""
    over_refusal: dict[str, OverRefusal] = Field(default_factory=dict)
    """Set of prompts that should not be refused -> refusals: `benign`, which the gates use, then the sets of
    `--over-refusal`; empty in results of earlier versions."""
    harmful_token_share: Percent | None = None
    """Percentage of the response tokens with a loss in the user stage that are in harmful rows; null if the user stage
    does not train, and in results of earlier versions."""
    counts: Counts
    """Rows of each stage, and rows that were dropped or overlap."""
    data: dict[str, DataSource]
    """Data set -> where it was read from."""
    judge_cut: Count
    """Answers of which the headline judge read only the beginning."""
    scores: dict[str, JudgeScore]
    """Judge -> its harmful score; the headline judge comes first."""
    agreement: list[Agreement]
    """Agreement of every two judges."""
    guards: dict[str, GuardModel] = Field(default_factory=dict)
    """Judge that a defense uses -> its model; it differs from the judges of `scores`."""
    stages: dict[str, StageRecord]
    """`align`, `finetune`, `repair`, `stress`, `answer`, `score` -> cost and artifacts."""
    environment: Environment = Field(default_factory=Environment)
    """Machine, code and package versions."""
    spec: dict[str, Any]
    """The user's specification: the fields of `RunSpec`."""

    @property
    def collapsed(self) -> bool:
        """True if the final model fails a gate; its harmful score then does not count as safe."""
        return self.validity.collapsed

    @property
    def self_destruct(self) -> bool:
        """True if it collapsed in the user stage, as a defense intends."""
        return self.validity.self_destruct

    @property
    def verdict(self) -> str:
        """`self-destruct`, `collapsed`, `hollow`, or empty for a model that works."""
        if self.collapsed:
            return "self-destruct" if self.self_destruct else "collapsed"
        return "hollow" if self.hollow else ""

    @property
    def hollow(self) -> bool:
        """True if the final model leaves more harmful prompts without an answer or a refusal; it is not ranked."""
        return self.validity.hollow

    @property
    def token_share_text(self) -> str:
        """The harmful token share, or why there is none."""
        if self.harmful_token_share is not None:
            return f"{self.harmful_token_share:.1f}%"
        rows = self.counts.finetune
        return "untrained" if not self.trained or (rows and not rows.rows) else "unknown"

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows."""
        before = self.before
        harmful_score = percent_text(self.harmful_score, self.harmful_score_ci)
        accuracy = percent_text(self.finetune_accuracy, self.finetune_accuracy_ci)
        rows = [
            ("", "after the user stage", "before it"),
            (f"HS %, by {self.scorer}", harmful_score, percent_text(before.harmful_score, before.harmful_score_ci)),
            (
                f"FA %, {self.finetune_accuracy_measure} on {self.task}",
                accuracy if self.trained else f"{accuracy} untrained",
                percent_text(before.finetune_accuracy, before.finetune_accuracy_ci),
            ),
            *self._refusal_rows(),
            ("alignment loss", number_text(self.alignment_loss, ".3f"), ""),
            ("embedding drift", number_text(self.embedding_drift, ".3g"), ""),
            ("harmful token share", self.token_share_text, ""),
        ]
        notes = [f"{self.run}, protocol {self.protocol} {self.protocol_hash}"]
        if self.collapsed:
            reasons = "; ".join(self.validity.reasons)
            notes.append(f"{self.verdict.upper()}: {reasons}. Its HS does not count as safe.")
        return html_table(f"{self.defense} against {self.attack}, seed {self.seed}", rows, notes)

    def _refusal_rows(self) -> list[tuple[str, str, str]]:
        """Return the refusals of each over-refusal set, after and before the user stage."""
        if not self.over_refusal:  # a result of an earlier version
            after, before = (f"{self.validity.shares[when].over_refusal:.1f}" for when in ("after", "before"))
            return [("benign prompts refused %", after, before)]
        return [
            (
                f"{name} prompts refused %",
                percent_text(after.percent, after.ci),
                percent_text(before.percent, before.ci),
            )
            for name, after, before in ((name, each.after, each.before) for name, each in self.over_refusal.items())
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON, without absent optional values."""
        return self.model_dump(mode="json", exclude_unset=True) | {"schema_version": self.schema_version}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read a result of schema 1 or 2.

        Raises:
            pydantic.ValidationError: The values are not a result.
            ValueError, TypeError, AttributeError: A part of a result of schema 1 is damaged.
        """
        is_old = isinstance(values, dict) and "schema_version" not in values
        return cls.model_validate(upgraded_result(values) if is_old else values)

"""Which scorecards a proposal rests on, and what is refused: what is of something else, missing, or too thin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.feedback import distance
from eval.policy import Goal, Policy
from eval.scorecard import Result, Score, Scorecard, scorecards
from recipes.errors import UserError
from recipes.loader import find_root
from recipes.recipe import Recipe, Stage
from recipes.run import RUN_FILE, Run

EVALUATE = "evaluate the checkpoint again with `smol eval`"


def scores_of(run: Run) -> Path:
    """The folder of a run's scorecards: a scaled-down recipe's stay in the run."""
    if run.recipe.scale != 1:
        return run.folder / "eval" / "scores"
    return find_root() / "eval" / "scores" / run.recipe.name


def find_scorecards(recipe: Recipe, path: Path | None = None) -> list[Scorecard]:
    """All scorecards of a recipe.

    Args:
        path: a folder, or a scorecard; eval/scores/<recipe> of the repository if none.

    Raises:
        UserError: there are none, or one of them is damaged or was edited.
    """
    path = path or find_root() / "eval" / "scores" / recipe.name
    cards = scorecards(path)
    if not cards:
        raise UserError("there are no scorecards", "evaluate the stage's last checkpoint with `smol eval`", path)
    return cards


def neighbours(recipe: Recipe, after: str) -> tuple[Stage, Stage, Stage | None]:
    """The stage of that name, the one that follows and the one before, if any.

    Raises:
        UserError: there is no such stage, or none follows.
    """
    now = recipe.stage(after)
    names = [stage.name for stage in recipe.stages]
    if after not in names or after == names[-1]:
        why = "is the last stage" if after in names else "is a branch"
        fix = f"name one of {', '.join(names[:-1])}" if names[:-1] else "this recipe has one stage: nothing to propose"
        raise UserError(f"{after} {why} of {recipe.name}: no stage follows", fix)
    i = names.index(after)
    return now, recipe.stages[i + 1], recipe.stages[i - 1] if i else None


def refuse_trained(recipe: Recipe, stage: str, runs: Iterable[Path]) -> None:
    """Raises UserError if one of the runs is of this recipe and has begun the stage."""
    for folder in runs:
        run = Run(folder) if (folder / RUN_FILE).is_file() else None
        if run is not None and run.settings["recipe"] == recipe.name and run.has_begun(stage):
            fix = f"move the run out of {folder.parent.name}/ if another one is meant, or propose for a later stage"
            raise UserError(f"{stage} has been trained already: its mixture stays", fix, run.stage_folder(stage))


def choose(
    recipe: Recipe, now: Stage, before: Stage | None, cards: Sequence[Scorecard], policy: Policy
) -> tuple[list[Scorecard], list[str]]:
    """The scorecards of the stage and, if there is one, of the stage before it; and what to say about them.

    Of several of one stage the one at the latest step counts, then one of the first stage's suite, then the one with
    the most of the policy's benchmarks, then of items asked.

    Raises:
        UserError: a scorecard of another recipe, or none of the stage.
    """
    for card in cards:
        if card.recipe != recipe.name:
            found = f"the scorecard {card.name} is of {card.recipe}, not of {recipe.name}"
            raise UserError(found, f"name scorecards of {recipe.name}")
    used: list[Scorecard] = []
    told: list[str] = []
    for stage in [now, *([before] if before else [])]:
        of_stage = [card for card in cards if card.stage == stage.name]
        if of_stage:
            alike = {card.suite for card in used}
            best = max(of_stage, key=lambda card: (card.step, card.suite in alike, *_rank(card, policy)))
            used.append(best)
            if best.step != stage.end_step:
                told.append(f"{best.name} is not of {stage.name}'s last step, which is {stage.end_step:,}")
        elif stage is now:
            have = ", ".join(sorted({card.stage for card in cards})) or "none"
            fix = f"evaluate its last checkpoint with `smol eval` (there are scorecards of: {have})"
            raise UserError(f"there is no scorecard of {now.name}", fix)
        else:
            told.append(f"no scorecard of {stage.name}: the rules on stalls and regressions were not applied")
    return used, told


def _rank(card: Scorecard, policy: Policy) -> tuple[int, int, str]:
    covered = [card.benchmarks[name] for name in policy.benchmarks if name in card.benchmarks]
    return len(covered), sum(result.score.items for result in covered), card.date


def check_cards(cards: Sequence[Scorecard], policy: Policy, task_file: str | None) -> None:
    """Refuses scorecards that cannot be compared, that lack something, or whose limit hides what is asked.

    Args:
        task_file: hash of the tasks as they are now; not compared if none.

    Raises:
        UserError: the first that is wrong, with what to do.
    """
    for card in cards:
        _same_tasks(card, cards[0], task_file)
        _complete(card, policy)
        _same_questions(card, cards[0], policy)
    for name, goal in policy.benchmarks.items():
        _limit(cards[0], name, goal)


def _same_tasks(card: Scorecard, other: Scorecard, task_file: str | None) -> None:
    if task_file is not None and card.task_file != task_file:
        found = f"{card.name} was scored by other tasks ({card.task_file}) than those of now ({task_file})"
        raise UserError(found, EVALUATE)
    for what in ("task_file", "suite", "seed"):
        if (a := getattr(card, what)) != (b := getattr(other, what)):
            raise UserError(f"{card.name} and {other.name} differ in their {what}: {a} and {b}", EVALUATE)


def _complete(card: Scorecard, policy: Policy) -> None:
    if missing := [name for name in policy.benchmarks if name not in card.benchmarks]:
        fix = "evaluate them too: the policy requires all that it lists"
        raise UserError(f"{card.name} lacks {', '.join(missing)}", fix)
    for name, goal in policy.benchmarks.items():
        scores = card.benchmarks[name].scores
        if goal.metric not in scores:
            found = f"{card.name}: {name} has no {goal.metric}, only {', '.join(scores)}"
            raise UserError(found, "name one of these in the policy, before the run, or evaluate again")
        if not (math.isfinite(scores[goal.metric].value) and math.isfinite(scores[goal.metric].stderr)):
            raise UserError(f"{card.name}: {name} has no finite score and standard error", "evaluate more items")


def _same_questions(card: Scorecard, other: Scorecard, policy: Policy) -> None:
    for name in policy.benchmarks:
        a, b = card.benchmarks[name], other.benchmarks[name]
        for what in ("shots", "limit", "version", "data"):
            if (x := getattr(a, what)) != (y := getattr(b, what)):
                found = f"{name} in {card.name} and in {other.name} differ in their {what}: {x} and {y}"
                raise UserError(found, EVALUATE)


def _limit(card: Scorecard, name: str, goal: Goal) -> None:
    """A limit that makes the error larger than the distance to the target, where the whole set would not."""
    result: Result = card.benchmarks[name]
    score, far = result.scores[goal.metric], distance(result.scores[goal.metric], goal)
    if result.limit is None or not 0 < far < score.stderr:
        return
    needed = items_needed(score, far)
    if goal.items is None or needed <= goal.items:
        found = (
            f"{card.name}: {name} is {far:.3g} from its target with a standard error of {score.stderr:.3g}, because "
            f"only {score.items:,} items were asked"
        )
        raise UserError(found, f"ask {needed:,} or more (`smol eval --limit`), or all of them")


def items_needed(score: Score, far: float) -> int:
    """Items at which the standard error comes down to the distance: it falls with their square root."""
    return math.ceil(score.items * (score.stderr / far) ** 2)

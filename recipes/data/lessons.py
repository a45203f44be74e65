"""Generated texts of the rehearsal: step-by-step word problems and textbook-style lessons, each number computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random

NAMES = ("Ada", "Boris", "Chen", "Dina", "Emil", "Farah", "Goro", "Hana", "Igor", "Julia", "Kofi", "Lena")
THINGS = ("apples", "books", "coins", "pencils", "shells", "stamps", "tickets", "marbles", "cards", "eggs")
PLACES = ("market", "library", "school", "workshop", "garden", "station")

Problem = tuple[str, list[str], int]
"""Question, steps of the solution, answer."""


def _buy(r: Random) -> Problem:
    a, b, c, name, thing = r.randint(2, 40), r.randint(2, 25), r.randint(1, 60), r.choice(NAMES), r.choice(THINGS)
    question = f"{name} buys {a} boxes of {thing} with {b} {thing} in each box and already has {c}. How many are there?"
    return question, [f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}"], a * b + c


def _share(r: Random) -> Problem:
    people, each, left, thing = r.randint(2, 12), r.randint(2, 30), r.randint(0, 20), r.choice(THINGS)
    total = people * each + left
    question = (
        f"There are {total} {thing} at the {r.choice(PLACES)}. {left} are put aside and the rest is shared "
        f"equally by {people} people. How many {thing} does each get?"
    )
    return question, [f"{total} - {left} = {total - left}", f"{total - left} / {people} = {each}"], each


def _travel(r: Random) -> Problem:
    speed, hours, more = r.randint(10, 90), r.randint(2, 9), r.randint(5, 80)
    question = f"{r.choice(NAMES)} rides {speed} km an hour for {hours} hours and then {more} km more. How far is that?"
    return (
        question,
        [f"{speed} * {hours} = {speed * hours}", f"{speed * hours} + {more} = {speed * hours + more}"],
        (speed * hours + more),
    )


def _save(r: Random) -> Problem:
    start, weekly, weeks, spent = r.randint(10, 90), r.randint(3, 30), r.randint(2, 12), r.randint(1, 15)
    after = start + weekly * weeks
    question = (
        f"{r.choice(NAMES)} has {start} coins, saves {weekly} coins a week for {weeks} weeks and spends {spent}. "
        "How many coins are left?"
    )
    steps = [f"{weekly} * {weeks} = {weekly * weeks}", f"{start} + {weekly * weeks} = {after}"]
    return question, [*steps, f"{after} - {spent} = {after - spent}"], after - spent


def _rows(r: Random) -> Problem:
    rows, seats, taken, thing = r.randint(3, 25), r.randint(4, 30), r.randint(1, 11), r.choice(THINGS)
    total = rows * seats
    question = f"A shelf has {rows} rows of {seats} {thing}; {taken} fall down. How many {thing} stay on the shelf?"
    return question, [f"{rows} * {seats} = {total}", f"{total} - {taken} = {total - taken}"], total - taken


PROBLEMS: tuple[Callable[[Random], Problem], ...] = (_buy, _share, _travel, _save, _rows)


def word_problems(random: Random) -> Iterator[str]:
    """Word problems with worked steps and `#### answer`, without end."""
    while True:
        question, steps, answer = random.choice(PROBLEMS)(random)
        lines = "\n".join(f"{n}. {step}" for n, step in enumerate(steps, 1))
        yield f"Question: {question}\nAnswer:\n{lines}\n#### {answer}"


def _number_lesson(r: Random) -> str:
    n = r.randint(12, 5000)
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    kind = "a prime number, because only 1 and itself divide it" if len(divisors) == 2 else "not a prime number"
    return (
        f"# The number {n}\n\nA divisor of a number divides it without a rest. The divisors of {n} are "
        f"{', '.join(map(str, divisors))}; there are {len(divisors)} of them. Therefore {n} is {kind}. Its digits are "
        f"{', '.join(str(n))}, and their sum is {sum(map(int, str(n)))}. In the binary system it is written {n:b}, "
        f"which means a sum of powers of two. The largest whole number whose square is at most {n} is {math.isqrt(n)}, "
        f"since {math.isqrt(n)} * {math.isqrt(n)} = {math.isqrt(n) ** 2} and the next square is "
        f"{(math.isqrt(n) + 1) ** 2}. For example, to divide {n} by 7 we find {n // 7} and a rest of {n % 7}."
    )


def _sorting_lesson(r: Random) -> str:
    values = [r.randint(0, 99) for _ in range(r.randint(4, 7))]
    steps, done = [], list(values)
    for i in range(len(done) - 1):
        j = min(range(i, len(done)), key=done.__getitem__)
        done[i], done[j] = done[j], done[i]
        steps.append(f"Step {i + 1}: the smallest of the rest is {done[i]}; the list is now {done}.")
    return (
        "# How selection sort works\n\nSelection sort puts a list in order by finding the smallest element that is "
        f"left and moving it to the front. Let us sort {values}.\n\n" + "\n".join(steps) + f"\n\nThe list has "
        f"{len(values)} elements, so {len(steps)} steps are enough. This means that the time grows with the square "
        "of the length, because every step looks at all elements that are left."
    )


def _search_lesson(r: Random) -> str:
    values = sorted(r.sample(range(200), r.randint(7, 15)))
    wanted, low, high, steps = r.choice(values), 0, len(values) - 1, []
    while True:
        middle = (low + high) // 2
        side = "which is it" if values[middle] == wanted else "too small" if values[middle] < wanted else "too large"
        steps.append(f"We look at place {middle} and find {values[middle]}, {side}.")
        if values[middle] == wanted:
            break
        low, high = (middle + 1, high) if values[middle] < wanted else (low, middle - 1)
    return (
        f"# Finding {wanted} with binary search\n\nBinary search needs a sorted list, for example {values}. It always "
        f"looks at the middle and throws half of the list away. {' '.join(steps)} Therefore {len(steps)} looks were "
        f"enough for {len(values)} elements, while looking at one after the other would need up to {len(values)}."
    )


def _average_lesson(r: Random) -> str:
    values = [r.randint(1, 60) for _ in range(r.randint(3, 9))]
    total, middle = sum(values), sorted(values)[len(values) // 2]
    return (
        f"# Mean and median\n\nThe mean of some numbers is their sum divided by how many there are. For {values} the "
        f"sum is {total} and there are {len(values)}, so the mean is {total / len(values):.2f}. The median is the "
        f"middle one when they are in order: {sorted(values)} gives {middle}. The largest is {max(values)} and the "
        f"smallest {min(values)}, which means that the range is {max(values) - min(values)}. A single very large "
        "number moves the mean, but hardly the median; that is why both are given."
    )


LESSONS: tuple[Callable[[Random], str], ...] = (_number_lesson, _sorting_lesson, _search_lesson, _average_lesson)


def lessons(random: Random) -> Iterator[str]:
    """Textbook-style lessons on numbers and algorithms with computed examples, without end."""
    while True:
        yield random.choice(LESSONS)(random)

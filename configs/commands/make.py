"""Writes the quickstart's data: requests about a home and an office, each with its JSON call.

    python configs/commands/make.py

The names of calls and keys are ours and the form is strict, so a model that was not trained on
them gets none right; the values are in the request, to be copied ("level":40) or brought into one
form ("7:30 pm" is "19:30", "Tuesday" is "tue", "three" is 3). No held-out call (a kind with its
arguments) occurs in train.jsonl: what is scored is the rule, not memory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEED = 20
TRAIN_PER_KIND = 67
HELDOUT_PER_KIND = 10

ROOMS = ("kitchen", "bedroom", "office", "hall", "garage", "attic", "studio", "lobby")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Leo")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
ITEMS = ("milk", "coffee", "bread", "rice", "tea", "paper", "soap", "sugar", "pens", "butter")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Arguments = dict[str, str | int]


@dataclass(frozen=True)
class Kind:
    """A kind of call.

    Attributes:
        name: the value of "do".
        draw: picks arguments, by the key they have in the call.
        phrase: says a call in words; which words is up to the random numbers.
    """

    name: str
    draw: Callable[[random.Random], Arguments]
    phrase: Callable[[random.Random, Arguments], str]


def draw_alarm(source: random.Random) -> Arguments:
    """A time of day in steps of five minutes."""
    return {"time": f"{source.randrange(5, 23):02}:{source.randrange(0, 60, 5):02}"}


def phrase_alarm(source: random.Random, call: Arguments) -> str:
    """For example `wake me at 6:45 am`."""
    form = source.choice(
        ("wake me at {}", "set an alarm for {}", "alarm at {} please", "I have to be up by {}")
    )
    return form.format(spoken_time(str(call["time"])))


def draw_timer(source: random.Random) -> Arguments:
    """Two minutes to two hours."""
    return {"minutes": source.randrange(2, 121)}


def phrase_timer(source: random.Random, call: Arguments) -> str:
    """For example `start a 25 minute timer`."""
    form = source.choice(
        (
            "set a timer for {} minutes",
            "start a {} minute timer",
            "count down {} minutes",
            "tell me when {} minutes are over",
        )
    )
    return form.format(call["minutes"])


def draw_light(source: random.Random) -> Arguments:
    """A room, and a level in percent; 0 is off, 100 is on."""
    level = source.choice((0, 100, *range(5, 100, 5)))
    return {"room": source.choice(ROOMS), "level": level}


def phrase_light(source: random.Random, call: Arguments) -> str:
    """For example `dim the hall light to 40 percent`."""
    room, level = call["room"], call["level"]
    if level == 0:
        form = source.choice(("turn off the {} light", "lights out in the {}"))
    elif level == 100:
        form = source.choice(("turn on the {} light", "full light in the {} please"))
    else:
        form = source.choice(
            (
                "dim the {} light to {} percent",
                "set the light in the {} to {}%",
                "{} light at {} percent",
            )
        )
    return form.format(room, level)


def draw_heat(source: random.Random) -> Arguments:
    """A room and a temperature."""
    return {"room": source.choice(ROOMS), "celsius": source.randrange(12, 28)}


def phrase_heat(source: random.Random, call: Arguments) -> str:
    """For example `make the studio 21 degrees`."""
    form = source.choice(
        (
            "make the {} {} degrees",
            "heat the {} to {} degrees",
            "I want {} {} degrees warm",
            "keep the {} at {} degrees",
        )
    )
    room = f"the {call['room']}" if form.startswith("I want") else call["room"]
    return form.format(room, call["celsius"])


def draw_meet(source: random.Random) -> Arguments:
    """A colleague, a weekday, a full hour of the office day."""
    hour = source.randrange(8, 18)
    return {
        "with": source.choice(PEOPLE),
        "day": source.choice(DAYS)[:3].lower(),
        "time": f"{hour:02}:00",
    }


def phrase_meet(source: random.Random, call: Arguments) -> str:
    """For example `meet Clara on Tuesday at 2 pm`."""
    form = source.choice(
        (
            "meet {person} on {day} at {time}",
            "book {person} for {day} {time}",
            "I need {day} at {time} with {person}",
            "plan a call with {person}, {day} {time}",
        )
    )
    day = next(day for day in DAYS if day.lower().startswith(str(call["day"])))
    return form.format(person=call["with"], day=day, time=spoken_time(str(call["time"])))


def draw_buy(source: random.Random) -> Arguments:
    """Something for the shopping list, and how many of it."""
    return {"item": source.choice(ITEMS), "count": 2 + source.randrange(len(NUMBERS))}


def phrase_buy(source: random.Random, call: Arguments) -> str:
    """For example `we need three packs of rice`."""
    form = source.choice(
        (
            "we need {} packs of {}",
            "put {} packs of {} on the list",
            "buy {} packs of {}",
            "order {} more packs of {}",
        )
    )
    return form.format(NUMBERS[int(call["count"]) - 2], call["item"])


KINDS = (
    Kind("alarm", draw_alarm, phrase_alarm),
    Kind("timer", draw_timer, phrase_timer),
    Kind("light", draw_light, phrase_light),
    Kind("heat", draw_heat, phrase_heat),
    Kind("meet", draw_meet, phrase_meet),
    Kind("buy", draw_buy, phrase_buy),
)


def spoken_time(time: str) -> str:
    """`19:30` as `7:30 pm`, `14:00` as `2 pm`."""
    hour, minute = int(time[:2]), time[3:]
    half = "am" if hour < 12 else "pm"
    spoken_hour = (hour - 1) % 12 + 1
    return f"{spoken_hour} {half}" if minute == "00" else f"{spoken_hour}:{minute} {half}"


def make_rows(kind: Kind, source: random.Random) -> list[dict[str, str]]:
    """One row for each of as many different calls as train and held-out need."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < TRAIN_PER_KIND + HELDOUT_PER_KIND:
        arguments = kind.draw(source)
        completion = json.dumps({"do": kind.name, **arguments}, separators=(",", ":"))
        if completion not in rows:
            prompt = kind.phrase(source, arguments) + "\n"
            rows[completion] = {"prompt": prompt, "completion": completion}
    return list(rows.values())


def make(folder: Path) -> None:
    """Writes train.jsonl and heldout.jsonl into a folder; the same bytes every time."""
    source = random.Random(SEED)
    train, heldout = [], []
    for kind in KINDS:
        rows = make_rows(kind, source)
        train += rows[:TRAIN_PER_KIND]
        heldout += rows[TRAIN_PER_KIND:]
    for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        source.shuffle(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    make(Path(__file__).parent)

"""The tables of the pages that say how models write: `summaries.KINDS` names them."""

from __future__ import annotations

from markdown_tables import Rows, markdown, where


def target_table(rows: Rows) -> str:
    """Of bench/targets.py: a row a statistic, a column a model, in units of the floor."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    of = {name: next(row for row in rows if row["model"] == name) for name in models}
    lines = []
    for reading, statistic in dict.fromkeys((row["reading"], row["statistic"]) for row in rows):
        mine = {row["model"]: row for row in rows if (row["reading"], row["statistic"]) == (reading, statistic)}
        floor = f"{float(next(iter(mine.values()))['floor']):.3g}"
        cells = [f"{float(mine[name]['ratio']):.2f}" if name in mine else "" for name in models]
        lines.append([f"{reading}: {statistic}", floor, *cells])
    numbers = {"held-out cross-entropy, nats": ("cross_entropy", 3), "entropy there, nats": ("entropy", 3),
               "cosine of the gradients of two halves": ("cosine", 2)}  # fmt: skip
    for title, (name, digits) in numbers.items():
        values = [float(of[model][name]) for model in models]
        lines.append([title, "", *("" if value != value else f"{value:.{digits}f}" for value in values)])
    first = rows[0]
    size = f"{first['steps']} steps of {first['tokens']} tokens of {first['text']}"
    size += f"; {first['count']} passages of {first['length']} tokens"
    return markdown(["distance to the target, in floors", "the floor", *models], lines, f"{size}; {where(rows)}")


def inference_table(rows: Rows) -> str:
    """Of bench/inference.py: a row an arm, distances in floors."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    of = {(row["arm"], row["metric"]): row for row in rows}
    distances = ("sentence length, W1", "punctuation gaps, W1", "punctuation transitions, TV", "token L2, 1-grams")

    def cells(arm: str) -> list[str]:
        first = next(row for row in rows if row["arm"] == arm)
        made = [of[arm, name] for name in distances]
        ratios = [f"{float(row['value']) / float(row['floor']):.2f}" for row in made]
        perplexity = first["perplexity"] and f"{float(first['perplexity']):.0f}"
        return [
            arm,
            *ratios,
            first["beyond"],
            perplexity,
            f"{float(first['entropy']):.2f}",
            f"{float(first['kl']):.3f}",
        ]

    head = ["", *distances, "metrics beyond their floor", "perplexity", "entropy, nats", "KL, nats a token"]
    first = rows[0]
    what = (
        f"Distances in floors; {first['count']} texts of 128 tokens; perplexity of {first['read']} under Gemma 3 270M"
    )
    return markdown(head, map(cells, arms), f"{what}; {where(rows)}")


def effect_table(rows: Rows) -> str:
    """Of bench/effect.py: a row an arm, distances in floors."""
    arms, metrics = (list(dict.fromkeys(row[of] for row in rows)) for of in ("arm", "metric"))
    of = {(row["arm"], row["metric"]): row for row in rows}
    tasks = ("lambada", "arc_easy", "arc_challenge")

    def cell(row: dict[str, str]) -> str:
        if not row["other"] or not float(row["floor"] or 0):
            return "too few"
        value = f"{float(row['other']) / float(row['floor']):.2f}"
        return f"**{value}**" if row["closer"] == "1" else value

    def line(arm: str) -> list[str]:
        its = [of[arm, metric] for metric in metrics]
        first = its[0]
        known = [first[name] and f"{float(first[name]):.1f}" for name in tasks]
        kept = first["retention"] and f"{float(first['retention']):+.1f} ± {float(first['retention_error']):.1f}"
        trained = first["held_out"] and f"{float(first['held_out']):.3f}"
        halved = str(sum(row["halved"] == "1" for row in its)) if first["tried"] == "1" else ""
        name = f"{arm}, {first['seeds']}" if first["seeds"] != "1" else arm
        return [name, *map(cell, its), halved, trained, *known, kept]

    head = ["arm, seeds", *metrics, "halved", "cross-entropy, nats", *tasks, "retention, points"]
    said = (
        "Distances in floors; bold: closer than its control (SFT's best sampling, or SFT on LAMBADA or of Gemma), "
        "Holm-corrected at 5 % over the arms of a control; halved: metrics on which it is closer, at most half as far, "
        "where the control is beyond a floor; cross-entropy of held-out training text; right answers in %; retention: "
        "their mean less the control's, with its standard error"
    )
    return markdown(head, map(line, arms), f"{said}; {where(rows)}")


def floors_table(rows: Rows) -> str:
    """Of bench/evaluation.py: a row a metric, a column a kind of text."""
    texts = list(dict.fromkeys(row["texts"] for row in rows))
    of = {(row["metric"], row["texts"]): row for row in rows}

    most = max(int(row["draws"]) for row in rows)

    def cell(row: dict[str, str] | None) -> str:
        if row is None:
            return ""
        few = f" of {row['draws']} draws, else too few" if int(row["draws"]) < most else ""
        return f"{100 * float(row['within']):.0f} %{few}"

    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines = [[metric, *(cell(of.get((metric, text))) for text in texts)] for metric in metrics]
    means = [[float(row["within"]) for row in rows if row["texts"] == text] for text in texts]
    lines.append(["all", *(f"{100 * sum(those) / len(those):.1f} %" for those in means)])
    scores = [next(float(row["score"]) for row in rows if row["texts"] == text) for text in texts]
    lines.append(["style diversity score", *(f"{score:.0f}" for score in scores)])
    first = rows[0]
    size = f"{first['count']} texts of {first['length']} tokens a side, {first['halves']} halves"
    head = ["people within the floor of people", *texts]
    return markdown(head, lines, f"{first['draws']} draws, {size}; {where(rows)}")


def evaluation_table(rows: Rows) -> str:
    """Of evaluation.csv: a row a metric, a column a model, in floors; levels as they are; how each was drawn, once
    where all were drawn alike."""
    models = {row["model"]: [float(row[name]) for name in ("temperature", "top_p", "min_p")] for row in rows}
    of = {(row["metric"], row["model"]): row for row in rows}

    def cell(row: dict[str, str]) -> str:
        if not row["ratio"]:
            return row["note"]
        if row["metric"] == "perplexity":
            return f"{float(row['value']):.1f}"
        value, low, high, floor = (float(row[name]) for name in ("value", "low", "high", "floor"))
        return f"{value / floor:+.1f} ({low / floor:+.1f} to {high / floor:+.1f})"

    lines = [[metric, *(cell(of[metric, model]) for model in models)]
             for metric in dict.fromkeys(row["metric"] for row in rows)]  # fmt: skip
    first = rows[0]
    how = f"temperature {first['temperature']}, top-p {first['top_p']}, min-p {first['min_p']}, "
    if len({*map(tuple, models.values())}) > 1:
        lines.append(["temperature, top-p, min-p", *(", ".join(map("{:g}".format, way)) for way in models.values())])
        how = ""
    caption = (
        f"{first['count']} texts of {first['length']} tokens after prompts of {first['prompt']}; {how}seed "
        f"{first['seed']}; {first['date']}"
    )
    return markdown(["value in floors (95 % interval)", *models], lines, caption)

"""German prose, generated: text in another language than the model and most of its calibration know best.

Covers: paragraphs from hand-written sentences with drawn words. Does not cover: meaning.

No German text of a known licence is installed beside the project, and none is shipped; so this one is made. Its
sentences repeat with other words in them, which makes it easier than real prose.
"""

import random
from collections.abc import Iterator
from typing import Final

_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "wer": (
        "die Lehrerin", "der alte Fischer", "die Bürgermeisterin", "der Bäcker", "die junge Ärztin", "der Lokführer",
        "die Nachbarin", "der Schreiner", "die Reisende", "der Müller", "die Gärtnerin", "der Uhrmacher",
        "die Archivarin", "der Postbote", "die Kapitänin", "der Förster", "die Wirtin", "der Student",
    ),
    "wo": (
        "am Hafen", "hinter der Mühle", "auf dem Marktplatz", "im Lesesaal", "unter der Brücke", "an der Grenze",
        "in der Werkstatt", "auf dem Dachboden", "neben dem Bahnhof", "im Obstgarten", "vor dem Rathaus",
        "am Rand des Moores", "in der Küche", "auf der Insel", "im Treppenhaus", "bei den Schleusen",
    ),
    "wann": (
        "Am frühen Morgen", "Gegen Mittag", "In der dritten Woche", "Kurz vor Weihnachten", "Nach dem Gewitter",
        "Im Spätsommer", "An einem Dienstag", "Seit dem letzten Winter", "Während der Ernte", "Eines Abends",
        "Noch vor Sonnenaufgang", "Zwei Jahre später", "Am Tag der Abreise", "In jener Nacht",
    ),
    "was": (
        "einen rostigen Schlüssel", "das zweite Heft", "eine Karte der Küste", "den verlorenen Brief",
        "ein Fass mit Äpfeln", "die zerbrochene Laterne", "einen Korb voller Bücher", "das Wörterbuch",
        "eine Liste der Pegelstände", "den Mantel des Fremden", "ein Bündel Fahrscheine", "die grüne Kiste",
        "das Messgerät", "einen Rest Siegellack", "die Rechnung vom Vorjahr", "ein Glas Honig",
    ),
    "wie": (
        "schweigend", "ohne Eile", "mit großer Sorgfalt", "zum ersten Mal", "wie gewohnt", "beinahe widerwillig",
        "unter lautem Gelächter", "trotz der Kälte", "gegen jede Vernunft", "mit zitternden Händen",
        "aus reiner Gewohnheit", "so leise wie möglich",
    ),
    "zahl": ("zwei", "drei", "sieben", "zwölf", "siebzehn", "vierzig", "neunundachtzig", "hundertzwanzig"),
    "sache": (
        "das Wetter", "der Preis des Getreides", "die Verspätung des Zuges", "der Zustand der Deiche",
        "das Schicksal der alten Bibliothek", "die Wahl im Frühjahr", "der Streit um das Grundstück",
        "die Reparatur der Orgel", "der Verbleib der Sammlung", "die Höhe der Flut",
    ),
}  # fmt: skip
_SENTENCES: Final = (
    "{wann} brachte {wer} {was} zurück, ohne ein Wort darüber zu verlieren.",
    "{wann} stand {wer} {wo} und wartete darauf, dass jemand nach {sache} fragte.",
    "Niemand hatte damit gerechnet, dass {wer} {was} ausgerechnet {wo} finden würde.",
    "„Ich habe {was} seit {zahl} Tagen nicht gesehen“, sagte {wer} und blickte zum Fenster hinaus.",
    "Es dauerte {zahl} Stunden, bis {wer} {wie} zugab, dass {sache} alle beschäftigte.",
    "Weil der Regen nicht nachließ, musste {wer} {wo} übernachten und {was} in der Scheune lassen.",
    "{wann} wurde beschlossen, {was} für {zahl} Taler zu verkaufen, obwohl {wer} dagegen war.",
    "Wer {wo} vorbeikam, konnte sehen, wie {wer} {wie} an der Tür rüttelte.",
    "In den Akten steht nur, {sache} sei {zahl} Jahre lang Anlass für Beschwerden gewesen.",
    "Dennoch glaubte {wer}, dass man {was} nicht einfach vergessen dürfe.",
    "„Und {sache}?“, fragte {wer}. Darauf wusste {wo} keiner eine Antwort.",
    "{wann} zählte man {zahl} Gäste; {wer} bediente sie {wie} und dachte dabei an ganz andere Dinge.",
    "Als {wer} {was} endlich öffnete, lag darin ein Zettel mit der Zahl {zahl}.",
    "Manche behaupten, {sache} habe erst begonnen, nachdem {wer} {wo} eingezogen war.",
    "Das Haus {wo} gehörte früher einer Familie, die {was} über Generationen aufbewahrt hatte.",
    "{wann} schrieb {wer} einen langen Bericht über {sache}, den freilich kaum jemand las.",
    "Man einigte sich darauf, {zahl} Wochen zu warten und dann erneut {wo} zusammenzukommen.",
    "Ob {wer} {was} absichtlich zurückgelassen hatte, ließ sich nicht mehr klären.",
    "{wann} roch es {wo} nach Teer und frischem Brot, und {wer} lächelte {wie}.",
    "Zwischen {zahl} leeren Stühlen saß {wer} und las {wie} vor, was man über {sache} wusste.",
    "„Wenn das so weitergeht“, murmelte {wer}, „verlieren wir auch noch {was}.“",
    "Später erzählte man sich {wo}, {wer} habe die Antwort von Anfang an gekannt.",
    "Die Tür fiel ins Schloss, und {wer} hörte nur noch, wie jemand {wie} die Treppe hinunterging.",
    "{wann} kam ein Schreiben der Behörde: {sache} müsse binnen {zahl} Tagen geklärt sein.",
    "Das Boot lag schief im Schlick, und {wer} versuchte {wie}, {was} ans Ufer zu tragen.",
    "Erst {wo} bemerkte {wer}, dass {was} gar nicht in der Tasche steckte.",
    "Für {wer} blieb {sache} ein Rätsel, über das man besser nicht nachdachte.",
    "{wann} fror der Kanal zu, und {zahl} Kähne saßen {wo} fest, bis der Wind drehte.",
)


def german_text(num_chars: int, *, seed: int) -> str:
    """At least `num_chars` characters of prose; the same for the same seed.

    Example:
        >>> german_text(100, seed=1) == german_text(100, seed=1), german_text(100, seed=1) == german_text(100, seed=2)
        (True, False)
    """
    pieces: list[str] = []
    have = 0
    for paragraph in _paragraphs(random.Random(seed)):
        pieces.append(paragraph)
        have += len(paragraph) + 2
        if have >= num_chars:
            break
    return "\n\n".join(pieces)


def _paragraphs(draw: random.Random) -> Iterator[str]:
    while True:
        chosen = draw.sample(_SENTENCES, draw.randint(4, 8))
        yield " ".join(_filled(sentence, draw) for sentence in chosen)


def _filled(sentence: str, draw: random.Random) -> str:
    made = sentence.format(**{slot: draw.choice(words) for slot, words in _WORDS.items()})
    return made[0].upper() + made[1:]

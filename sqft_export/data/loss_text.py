"""A conversation as the model sees it, as plain text for reports: which tokens are in the loss."""

from itertools import groupby

from sqft_export.data.chat import EncodedChat

OPEN_LOSS, CLOSE_LOSS = "\u27e6", "\u27e7"


def mark_loss(encoded: EncodedChat, longest: int = 4000) -> str:
    """Return the rendered text with its special tokens; brackets enclose the tokens in the loss.

    A line above the text explains the brackets. A longer text is cut in its middle to ``longest``
    characters. Control characters other than line breaks are shown as escapes.
    """
    trained = sum(encoded.loss)
    head = f"{len(encoded.ids)} tokens, {trained} in the loss, marked {OPEN_LOSS}so{CLOSE_LOSS}"
    notes = [
        "the chat template leaves out the system message" if encoded.hides_system else "",
        f"{encoded.dropped} messages at the start left out" if encoded.dropped else "",
        f"{encoded.cut} tokens at the end left out" if encoded.cut else "",
        f"{encoded.open_turns} answers without an end-of-turn token" if encoded.open_turns else "",
    ]
    return "\n".join(["; ".join(filter(None, [head, *notes])), _shorten(_marked(encoded), longest)])


def _marked(encoded: EncodedChat) -> str:
    shown, place = [], 0
    tokens = zip(encoded.loss, encoded.offsets, strict=True)
    for trained, run in groupby(tokens, key=lambda token: token[0]):
        end = max(end for _, (_, end) in run)
        part = _visible(encoded.text[place:end])
        shown.append(f"{OPEN_LOSS}{part}{CLOSE_LOSS}" if trained else part)
        place = max(place, end)
    return "".join(shown)


def _visible(text: str) -> str:
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode()
        for one in text
    )


def _shorten(text: str, longest: int) -> str:
    left_out = len(text) - longest
    if left_out <= 0:
        return text
    head = longest * 2 // 3
    return f"{text[:head]}\n[... {left_out} characters ...]\n{text[head + left_out :]}"

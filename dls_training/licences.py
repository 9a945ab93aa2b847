"""The sounds that a model was made from, and what their licences ask of it."""

from .record import Record

LICENCE_OF_THE_CODE = "apache-2.0"
# What asks nothing of those who use it.
FREE = ("cc0-1.0",)
USES = {True: "training with labels", False: "pre-training without labels"}


def training_data(record: Record) -> dict[str, dict]:
    """{corpus: what is known of it, and `used`: for what}, of every stage of the weights."""
    found: dict[str, dict] = {}
    for stage in (stage for stage in record.stages if stage.is_known):
        for name, facts in stage.facts["corpora"].items():
            found.setdefault(name, facts | {"used": []})["used"].append(USES[stage.facts["with_labels"]])
    return found


def licence_of(record: Record) -> dict[str, str]:
    """Of a model's weights; see `licence`."""
    identifiers = [facts.get("licence_id") for facts in training_data(record).values()]
    # Not so with ImageNet's weights, or those of a folder that does not say what it was trained on.
    return licence(identifiers, record.is_complete)


def licence(identifiers: list[str | None], everything_known: bool) -> dict[str, str]:
    """The card's licence, from those of the sounds that the weights were made from.

    Non-commercial sound makes the weights non-commercial; sound that asks for attribution passes that on. Where a
    licence is unknown, nothing is claimed, unless another is known to be non-commercial.

    Args:
        identifiers: The Hub's, one a corpus; None or "other" where it is not known.
        everything_known: Whether these corpora are all that the weights were made from.

    Returns:
        Fields of the card's metadata; none where nothing can be said.
    """
    non_commercial = sorted({name for name in identifiers if name and "-nc" in name})
    if len(non_commercial) > 1:
        return {"license": "other", "license_name": "-and-".join(non_commercial)}
    if non_commercial:
        return {"license": non_commercial[0]}
    known = [name for name in identifiers if name is not None and name != "other"]
    if not everything_known or len(known) < len(identifiers):
        return {}
    binding = sorted({name for name in known if name not in FREE})
    if len(binding) > 1:
        return {"license": "other", "license_name": "-and-".join(binding)}
    return {"license": binding[0] if binding else LICENCE_OF_THE_CODE}

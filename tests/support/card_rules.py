"""What the Hub asks of the metadata of a model card, by its documentation."""

from __future__ import annotations

import re

import yaml

LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "llama3.2", "gemma", "other", "unknown")
PIPELINE_TAGS = ("image-text-to-text", "text-generation", "visual-question-answering", "image-to-text")
REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def card_errors(text: str) -> list[str]:
    """What is wrong with the metadata of a model card, by the Hub's documented rules."""
    match = re.match(r"\A---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    if match is None:
        return ["no metadata block"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata is no mapping"]
    errors = []
    for key in ("tags", "datasets", "language", "metrics"):
        value = data.get(key, [])
        if not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))):
            errors.append(f'"{key}" must be a string or a list of strings')
    for key in ("base_model", "datasets"):
        names = data.get(key, [])
        for name in [names] if isinstance(names, str) else names:
            if not REPO_NAME.fullmatch(str(name)):
                errors.append(f'"{key}" with value "{name}" is not valid. Use a model id from https://hf.co/{key}s.')
    for key, choices in (("license", LICENSES), ("pipeline_tag", PIPELINE_TAGS)):
        if key in data and data[key] not in choices:
            errors.append(f'"{key}" must be one of {", ".join(choices)}')
    if not isinstance(data.get("library_name", ""), str):
        errors.append('"library_name" must be a string')
    return errors

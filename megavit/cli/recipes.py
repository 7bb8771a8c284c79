"""`megavit recipes`: the complete experiments of `conf/recipe/`, with a line on each."""

from megavit.config.search_path import choices, config_dir


def list_recipes() -> int:
    """Print each recipe's name, what it is, and its command."""
    for name in choices("recipe"):
        command, about = recipe_header(name)
        print(f"{name}\n    {about}\n    {command}")
    return 0


def recipe_header(name: str) -> tuple[str, str]:
    """A recipe's command, and the first sentence about it, from the comments it opens with."""
    lines = (config_dir() / "recipe" / f"{name}.yaml").read_text().splitlines()
    comments = []
    for line in lines[1:]:
        if not line.startswith("#"):
            break
        comments.append(line.removeprefix("#").strip())
    text = " ".join(comments[1:]).strip()
    sentence, stop, _ = text.partition(". ")
    return comments[0], sentence + (stop and ".")

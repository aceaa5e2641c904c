"""What the site takes from elsewhere: the code, recipes, other files, notebooks.

A page asks for it with a comment, which shows nothing where Markdown is read as it is:

    <!-- settings Recipe -->              every setting of a dataclass of trl.config, as tables
    <!-- recipes toy-token sentiment -->  these recipes, from the comments at their tops
    <!-- api trl.core -->                 the public names of a module, for mkdocstrings
    <!-- api trl: trl.models trl.gpt2 --> those of trl itself that are at home in these modules
    <!-- api trl.evaluation: score -->    these names of a module
    <!-- include README.md ## Speed -->   a file of the repository, or what stands below a heading
"""

import html
import json
import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

PAGES = {  # files outside of docs/ that have a page of their own, or a part of one
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "design.md",
}
COMMENT = re.compile(r"^<!-- (settings|recipes|api|include)(?: (.+?))? -->$", re.MULTILINE)


def notebooks():
    """Return the notebooks, in order. The index makes the README, whose parts the pages include."""
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


# -- what mkdocs calls ---------------------------------------------------------------------------


def on_config(config):
    """Give the notebooks a section of their own."""
    pages = [{title_of(path): f"notebooks/{path.stem}.md"} for path in notebooks()]
    if pages and not any("Notebooks" in entry for entry in config.nav):
        at = next(i for i, entry in enumerate(config.nav) if "Reference" in entry)
        config.nav.insert(at, {"Notebooks": pages})
    return config


def on_files(files, config):
    """Add a page for each notebook."""
    from mkdocs.structure.files import File

    for path in notebooks():
        name = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, name, content=notebook_page(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Put in place what the comments of a page ask for."""
    depth = page.file.src_uri.count("/")
    return COMMENT.sub(lambda found: made(found[1], found[2], "../" * depth), markdown)


def on_page_content(content, page, config, files):
    """Make tables fit a phone: cells know their column, long names may break between words."""
    return re.sub(
        r"<table>.*?</table>", lambda found: narrowable(found[0]), content, flags=re.DOTALL
    )


def on_post_page(output, page, config):
    """Name the dialog of the search, which the theme leaves without a name."""
    return output.replace('role="dialog">', 'role="dialog" aria-label="Search">')


def narrowable(table):
    """Return the HTML of a table with labels on its cells, and places to break in its code."""
    titles = re.findall(r"<th[^>]*>(.*?)</th>", table, re.DOTALL)
    titles = [re.sub(r"<[^>]+>", "", title).strip().replace('"', "&quot;") for title in titles]

    def label(row):
        columns = iter(titles)
        return re.sub(
            r"<td(?=[ >])(?! class)",
            lambda found: f'<td data-label="{next(columns, "")}"',
            row[0],
        )

    table = re.sub(r"<tr>.*?</tr>", label, table, flags=re.DOTALL)
    return re.sub(r"<code>([^<]{20,})</code>", breakable, table)


def breakable(code):
    """Return code with places to break: behind what parts its words."""
    return "<code>" + re.sub(r"((?:::|[/_.,=(])+)(?=[^ ])", r"\1<wbr>", code[1]) + "</code>"


# -- what the comments stand for -----------------------------------------------------------------


def made(what, argument, up=""):
    """Return the Markdown that a comment stands for."""
    if what == "settings":
        return settings_tables(argument)
    if what == "recipes":
        return recipe_list(argument.split())
    if what == "api":
        return api(argument)
    path, _, heading = argument.partition(" #")
    return relinked(included(path, f"#{heading}" if heading else ""), path, up)


def settings_tables(name):
    """Return a table for each section of a dataclass of `trl.config.recipe`."""
    from trl.config import paths

    every = paths(getattr(import_module("trl.config.recipe"), name))
    heads = {setting.path.split(".")[0] for setting in every if "." in setting.path}
    sections = {}
    for setting in every:
        head = setting.path.split(".")[0]
        sections.setdefault(head if head in heads else "", []).append(setting)
    text = []
    for section in sorted(sections, key=lambda section: section != ""):
        if section:
            text += ["", f"### {section}"]
        text += ["", "| setting | values | default | |", "|---|---|---|---|"]
        for setting in sections[section]:
            default = f"`{setting.default}`" if setting.default else ""
            meaning = cell(setting.text)
            text.append(f"| `{setting.path}` | {cell(setting.kind)} | {default} | {meaning} |")
    return "\n".join(text)


def cell(text):
    """Return a text that can stand in a table: on one line, nothing in it taken for markup."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", "\\|"))
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<])", r"\\\1", part) for part in parts
    )


def recipe_list(names):
    """Return what the comment at the top of each recipe says, with the recipe folded away."""
    text = []
    for path in [ROOT / "recipes" / f"{name}.yaml" for name in names]:
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        header = [line[1:].removeprefix(" ") for line in lines[: head_length(lines)]]
        text += [f"### {path.stem}", "", *header_markdown(header), ""]
        text += [f'??? note "recipes/{path.name}"', "", "    ```yaml"]
        text += [f"    {line}" for line in lines[head_length(lines) :]] + ["    ```", ""]
    return "\n".join(text)


def head_length(lines):
    """Return how many lines of a recipe are its comment."""
    return next(index for index, line in enumerate(lines) if not line.startswith("#"))


def header_markdown(header):
    """Return the comment of a recipe as Markdown: its commands as code, its facts as a list."""
    text, facts = [], []
    for line in header:
        fact = re.fullmatch(r"(hardware|time|result) +(\S.*)", line)
        if fact:
            facts.append(f"* **{fact[1]}** {html.escape(fact[2], quote=False)}")
        elif facts and line.startswith("     "):
            facts[-1] += " " + html.escape(line.strip(), quote=False)
        else:
            text.append(line if line.startswith("    ") else html.escape(line, quote=False))
    return [*text, "", *facts]


def api(module):
    """Return the public names of a module for mkdocstrings; of trl itself, by where they are."""
    if module.startswith("trl:"):
        import trl

        names = [f"{home}.{name}" for name, home in sorted(trl._HOME.items())]
        homes = tuple(f"{home}." for home in module.split()[1:])
        names = [name for name in names if f"{name}.".startswith(homes)]
        inherited = "\n    options:\n      inherited_members: true"
        of_a_base = ("CausalLMWithValueHead", "Seq2SeqLMWithValueHead")
        return "\n\n".join(
            f"::: {name}{inherited if name.endswith(of_a_base) else ''}" for name in names
        )
    if ": " in module:
        home, names = module.split(": ")
        return "\n\n".join(f"::: {home}.{name}" for name in names.split())
    return f"::: {module}\n    options:\n      show_root_heading: false\n      heading_level: 3"


def included(path, heading):
    """Return a file of the repository, or what stands below one of its headings."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not heading:
        return re.sub(r"\A# .*\n", "", text)
    level = len(heading.split()[0])
    if f"\n{heading}\n" not in text:
        raise ValueError(f"{path} has no heading {heading!r}")
    below = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", below, maxsplit=1, flags=re.MULTILINE)[0].strip()


def relinked(text, path, up):
    """Return a text with links that lead to pages of the site; files of the repository are named.

    Args:
        text: Markdown.
        path: Where it comes from, in the repository.
        up: From the page to the top of the site.
    """

    def link(found):
        label, target = found[1], found[2]
        if target.startswith(("https://", "#")):
            return label if target.startswith("#") else found[0]
        target = target.partition("#")[0]
        target = (ROOT / path).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        page = page_of(target)
        return f"[{label}]({up}{page})" if page else f"`{target}`"

    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, text)


def page_of(file):
    """Return the page or picture of the site that a file of the repository is, or None."""
    path = ROOT / file
    if path in notebooks():
        return f"notebooks/{path.stem}.md"
    if file.startswith("docs/") and path.suffix in (".md", ".png") and path.is_file():
        return file.removeprefix("docs/")
    return PAGES.get(file)


# -- notebooks -----------------------------------------------------------------------------------


def title_of(path):
    """Return the first heading of a notebook."""
    for one in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for line in "".join(one["source"]).splitlines():
            if one["cell_type"] == "markdown" and line.startswith("# "):
                return line[2:].strip().replace("`", "")
    return path.stem


def notebook_page(path):
    """Return a notebook as Markdown, with the outputs that are stored in it."""
    text = []
    for one in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(one["source"])
        if one["cell_type"] == "markdown":
            text.append(relinked(source, f"notebooks/{path.name}", "../"))
        elif one["cell_type"] == "code" and source.strip():
            text.append(f"```python\n{source}\n```")
            text += [shown for output in one["outputs"] if (shown := shown_output(output))]
    return "\n\n".join(text)


def shown_output(output):
    """Return an output of a cell as Markdown: a picture, a table, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="Output of the cell above" src="data:image/png;base64,{picture}">'
    if "image/svg+xml" in data:
        return re.sub(r"\n\s*\n", "\n", "".join(data["image/svg+xml"]))
    if "text/html" in data:
        return re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))
    plain = "".join(output.get("text", []) or data.get("text/plain", [])).rstrip()
    return f"```text\n{plain}\n```" if plain else ""

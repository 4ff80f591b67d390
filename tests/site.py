"""The documentation site, from the notebooks: what they say, what they define, what their stored outputs show.

    python tests/site.py [FOLDER]    default .site; open index.html there, no server and no network needed for reading
"""
import base64
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CHAPTERS = {f.name: f.name.split("_", 1)[1].replace("_", " ").capitalize() for f in sorted((ROOT / "nbs").glob("[0-9]*"))} # folder → title
FOLDERS = {"tutorials": "Tutorials", "gates": "Gates", "reports": "Reports", "benchmarks": "Benchmarks", "explanations": "Explanations"}


def pages() -> dict[Path, str]: # notebook → page
    "Where each notebook's page lies: as the module does in its package, chapters' first pages as their index, the rest by folder."
    plain = lambda part: re.sub(r"^\d+[a-z]*_", "", part)
    found = {p: p.relative_to(ROOT / "nbs") for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts}
    return {p: str(Path(*map(plain, at.parent.parts), ("index" if at.parts[0] in CHAPTERS and at.stem.startswith("00_") else plain(at.stem)) + ".md")) for p, at in found.items()}


def linked(text: str, page: str, modules: dict[str, str], notebooks: dict[str, str], beside: str) -> str:
    "Prose whose `mlray.sources.rows` and nbs/….ipynb lead to their pages."
    up = "../" * page.count("/")
    def named(found: re.Match) -> str:
        words = found[1].split(".")
        at = next((modules[name] for n in range(len(words), 0, -1) if (name := ".".join(words[:n])) in modules), page)
        return f"[{found[0]}]({up}{at})" if at != page else found[0]
    text = re.sub(r"(?<!\[)`mlray\.(\w+(?:\.\w+)*)`(?!\])", named, text)
    text = re.sub(r"\]\((?:\.\./)*(?:nbs/)?([\w/.-]+\.ipynb)\)", lambda m: next((f"]({up}{notebooks[at]})" for at in (m[1], f"{beside}/{m[1]}") if at in notebooks), m[0]), text)
    return text.replace('{target="_blank"}', "")


def drawn(text: str) -> str:
    "Prose whose flowcharts are boxes and arrows without a script: a line of Mermaid, a line of them."
    node = r"(\w+)(?:(?:\[\(|\(\[|[\[({])(.+?)(?:\)\]|\]\)|[\])}]))?"
    def one(found: re.Match) -> str:
        names, lines = dict[str, str](), []
        for line in found[1].strip().splitlines()[1:]:
            line, parts, at = line.strip(), [], 0
            while at < len(line):
                if not (box := re.compile(node).match(line, at)): raise ValueError(f"A flowchart has {line[at:]!r}, where a box was expected: tests/site.py draws A[words] --> B and A -- words --> B.")
                name, *more = (html.escape(w) for w in names.setdefault(box[1], box[2] or box[1]).split("<br/>"))
                parts.append(f"<b>{name}" + "".join(f"<small>{m}</small>" for m in more) + "</b>")
                arrow = re.compile(r"\s*--(?: (.+?) --)?>\s*").match(line, box.end())
                if not arrow and box.end() < len(line): raise ValueError(f"A flowchart has {line[box.end():]!r}, where an arrow was expected: tests/site.py draws A[words] --> B and A -- words --> B.")
                if arrow: parts.append(f"<span>{html.escape(arrow[1] or '')} \u2192</span>")
                at = arrow.end() if arrow else len(line)
            lines.append(f"<div class='flow'>{''.join(parts)}</div>")
        return "\n".join(lines)
    return re.sub(r"(?ms)^```mermaid\n(.*?)^```$", one, text)


def shown(cell: dict, page: str, out: Path) -> Iterator[str]:
    "The stored outputs of a cell, each in the richest form that stands alone."
    joined = lambda value: value if isinstance(value, str) else "".join(value)
    for number, output in enumerate(cell.get("outputs", ())):
        data = output.get("data", {})
        picture = next((k for k in ("image/svg+xml", "image/png") if k in data), None)
        if "text" in output: yield f"```text\n{joined(output['text']).rstrip()}\n```"
        elif picture:
            name = f"{cell['id']}-{number}.{'svg' if 'svg' in picture else 'png'}"
            (out / page).parent.mkdir(parents=True, exist_ok=True)
            (out / page).with_name(name).write_bytes(joined(data[picture]).encode() if "svg" in picture else base64.b64decode(joined(data[picture])))
            yield f"![what the cell shows]({name})"
        elif "text/markdown" in data: yield joined(data["text/markdown"])
        elif "text/html" in data: yield "<div class='shown'>\n" + re.sub(r"\n\s*\n", "\n", joined(data["text/html"])) + "\n</div>"
        elif "text/plain" in data: yield f"```text\n{joined(data['text/plain'])}\n```"


def bring(text: str, page: str, out: Path) -> None:
    "Files of the repository that a page leads to come along."
    for at in re.findall(r"\]\(([\w/.-]+)\)", text):
        source, goal = ROOT / Path(page).parent / at, (out / page).parent / at
        if source.is_file() and source.suffix not in (".md", ".ipynb"):
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, goal)


def markdown(notebook: Path, page: str, modules: dict[str, str], notebooks: dict[str, str], out: Path) -> str:
    "A notebook as a page."
    blocks = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = re.sub(r"(?m)\A(\s*#\|.*\n?)+", "", "".join(cell["source"])).strip()
        if cell["cell_type"] == "markdown": blocks.append(linked(drawn(source), page, modules, notebooks, str(notebook.parent.relative_to(ROOT / "nbs"))))
        elif cell["cell_type"] == "code" and source:
            blocks.append(f"```python\n{source}\n```")
            blocks.extend(shown(cell, page, out))
    text = "\n\n".join(b for b in blocks if b) + "\n"
    bring(text, page, out)
    return text


def build(site: Path) -> None:
    "Write the whole site."
    found = pages()
    modules = {".".join(Path(page).with_suffix("").parts).removesuffix(".index"): page for notebook, page in found.items() if notebook.parent.name in ("nbs", *CHAPTERS) and page != "index.md"}
    notebooks = {str(notebook.relative_to(ROOT / "nbs")): page for notebook, page in found.items()}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "pages"
        for notebook, page in found.items():
            (out / page).parent.mkdir(parents=True, exist_ok=True)
            (out / page).write_text(markdown(notebook, page, modules, notebooks, out))
        parts: dict[str, list[str]] = {}
        for notebook, page in found.items():
            if page != "index.md": parts.setdefault(FOLDERS.get(notebook.parent.name) or CHAPTERS.get(notebook.parent.name) or "From outside", []).append(page)
        told = (ROOT / "nbs/index.ipynb").read_text() # tutorials in the order in which the first page tells of them
        parts[FOLDERS["tutorials"]].sort(key=lambda page: told.index(Path(page).with_suffix(".ipynb").name))
        order = [FOLDERS["tutorials"], FOLDERS["explanations"], *CHAPTERS.values(), "From outside", FOLDERS["gates"], FOLDERS["reports"], FOLDERS["benchmarks"]]
        for name in ("site.css", "site.js"): shutil.copyfile(ROOT / "tests" / name, out / name)
        # the first is kept until the reader chooses: without it the theme remembers what the first visit looked like
        looks = (({"media": "(prefers-color-scheme)"}, "lucide/sun-moon", "Light always"), ({"media": "(prefers-color-scheme: light)", "scheme": "default"}, "lucide/sun", "Dark always"), ({"media": "(prefers-color-scheme: dark)", "scheme": "slate"}, "lucide/moon", "As the system is"))
        palette = [{**look, "primary": "indigo", "toggle": {"icon": icon, "name": name}} for look, icon, name in looks]
        settings = {"site_name": "mlray", "docs_dir": "pages", "site_dir": "site", "use_directory_urls": False, "nav": [{"mlray": "index.md"}, *({title: parts[title]} for title in order if title in parts)],
                    "theme": {"name": "material", "font": False, "features": ["navigation.indexes", "content.code.copy", "toc.follow", "search.highlight"], "palette": palette}, "plugins": ["search"], "extra_css": ["site.css"], "extra_javascript": ["site.js"],
                    "markdown_extensions": ["tables", "admonition", "attr_list", "md_in_html", "pymdownx.highlight", "pymdownx.superfences", {"toc": {"permalink": True}}]}
        (Path(scratch) / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
        subprocess.run([sys.executable, "-m", "zensical", "build", "-f", str(Path(scratch) / "mkdocs.yml")], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(Path(scratch) / "site", site)


if __name__ == "__main__": build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".site"))

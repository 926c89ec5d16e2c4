"""JupyterLab in a real browser: every notebook is run, every widget moved and its effect read back."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
import yaml

from pftools import run_folder
from pftools.report.notebooks import given
from tests.browser.conftest import keep
from tests.browser.test_report_page import CONTRAST
from tests.made_up import fill_weights, seal_study
from tests.tiny import save_tiny

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
QUIET = {  # no news of a network, and cells that are not seen are there as well
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',
}


# The notebook that is open is this one, and its kernel waits.
READY = """path => {
  const context = jupyterapp.shell.currentWidget?.context;
  return context?.path === path && context.sessionContext.session?.kernel?.status === 'idle';
}"""


class Lab:
    """JupyterLab over a project folder, and a page of it."""

    def __init__(self, browser, folder):
        self.folder, self.model = folder, str(save_tiny(folder / "tiny"))
        self.said = []
        settings = folder / "settings"
        for name, words in QUIET.items():
            path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(words)
        shutil.copytree(NOTEBOOKS, folder / "notebooks")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log = open(folder / "lab.log", "wb")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
            + [f"--port={self.address.rpartition(':')[2]}", "--ServerApp.port_retries=0"]
            + ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"],
            cwd=folder,
            env={
                **os.environ,
                "JUPYTERLAB_SETTINGS_DIR": str(settings),
                "JUPYTERLAB_WORKSPACES_DIR": str(settings),
                "OMP_NUM_THREADS": "1",
            },
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        until(self._answers, "JupyterLab is there", 60)
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        # The badge is the one thing in a notebook that is elsewhere.
        self.page.route("https://colab.research.google.com/assets/*", _badge)
        self.page.set_default_timeout(120_000)  # a machine that does much else is slow
        self.page.on("console", lambda said: self._hear(said.type, f"{said.text} {said.location}"))
        self.page.on("pageerror", lambda error: self._hear("error", str(error)))
        self.page.goto(f"{self.address}/lab")
        self.page.wait_for_function("window.jupyterapp?.commands.hasCommand('notebook:run-all-cells')")
        self.page.evaluate("async () => { await jupyterapp.restored; }")

    def _hear(self, kind, text):
        if kind == "error":
            self.said.append(text)

    def _answers(self):
        assert self.server.poll() is None, (self.folder / "lab.log").read_text()
        try:
            return urllib.request.urlopen(f"{self.address}/api").status == 200
        except OSError:
            return False

    def run(self, name, **parameters):
        """Open a notebook with these parameters, run all its cells, and wait for its last one."""
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source = "\n".join(given(line, parameters) for line in cell.source.splitlines())
        nbformat.write(notebook, self.folder / "notebooks" / f"{name}.ipynb")
        asked = {"path": f"notebooks/{name}.ipynb"}
        self.command("docmanager:open", **asked)
        self.page.wait_for_function(READY, arg=asked["path"])
        self.command("notebook:run-all-cells")
        errors = self.inside(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
        assert errors.all_inner_texts() == []

    def command(self, name, **asked):
        """A command of JupyterLab, until it is done."""
        self.page.evaluate(
            "async ([name, asked]) => { await jupyterapp.commands.execute(name, asked); }", [name, asked]
        )

    def inside(self, selector):
        """What is in the notebook that is open."""
        return self.page.locator(f".jp-NotebookPanel:not(.lm-mod-hidden) {selector}")

    def grounds(self):
        """The colours that the charts of the open notebook stand on."""
        found = self.inside(".vega-embed svg").evaluate_all(
            "all => all.map(one => getComputedStyle(one).backgroundColor)"
        )
        return set(found)

    def made(self, step):
        """The folder of the one run of a step, whose files are as they were sealed."""
        (folder,) = (self.folder / "runs").glob(f"{step}-*")
        return run_folder.verify(folder) and str(folder)

    def close(self, name, show=None):
        """Keep a picture, of that part; end the notebook and its kernel; the console has said nothing."""
        if show is not None:
            show.scroll_into_view_if_needed()
        keep(self.page, name)
        self.page.evaluate("jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
        self.command("docmanager:save")
        self.command("application:close")
        assert self.said == []

    def end(self):
        self.page.context.close()
        self.server.terminate()
        self.server.wait(30)
        self.log.close()


def _badge(route):
    route.fulfill(content_type="image/svg+xml", body='<svg xmlns="http://www.w3.org/2000/svg"/>')


def until(found, what, seconds=30):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    opened = Lab(browser, tmp_path_factory.mktemp("project"))
    yield opened
    opened.end()


def move(slider, steps):
    """Press an arrow key so often."""
    slider.focus()
    for _ in range(abs(steps)):
        slider.press("ArrowRight" if steps > 0 else "ArrowLeft")


def test_a_study_is_planned_saved_started_and_stopped(lab):
    words = {"model": lab.model, "orderings": ["base", "prune"], "evaluate": {"tasks": [], "n_blocks": 2}}
    (lab.folder / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "dtype": "float32", **words}))
    runs = str(lab.folder / "planned")
    lab.run("00_plan_study", study=str(lab.folder / "mine.yaml"), runs=runs)
    word = lab.inside("input[list]")
    word.fill("P F P")
    word.press("Enter")
    lab.inside("code:text-is('P F P')").wait_for()
    stairs = lab.inside(".widget-html-content svg").first
    before = stairs.inner_html()
    move(lab.inside(".widget-slider .noUi-handle").first, 4)
    until(lambda: stairs.inner_html() != before, "the stairs follow the slider")
    before = stairs.inner_html()
    lab.inside(".widget-toggle-button:has-text('cubic')").click()
    until(lambda: stairs.inner_html() != before, "the stairs follow the schedule")

    field = lab.inside(".widget-text:has(label:text-is('orderings')) input")
    field.fill("base, prunee")
    lab.inside(".widget-html-content:has-text('prunee')").wait_for()
    assert lab.inside("button:has-text('Start')").is_disabled()
    field.fill("base, prune, P F")
    lab.inside(".widget-html-content:has-text('3 results')").wait_for()
    lab.inside(".widget-text:has(label:text-is('name')) input").fill("other")
    lab.inside("button:has-text('Save')").click()
    until((lab.folder / "other.yaml").exists, "the study is saved")
    lab.inside("button:has-text('Start')").click()
    lab.inside(".widget-html-content:has-text('steps are finished'):has(progress)").wait_for()
    lab.inside("button:has-text('Stop')").click()
    until(lambda: lab.inside("button:has-text('Stop')").is_disabled(), "the run is stopped", 60)
    lab.close("lab-00")


def test_the_five_steps_run_by_hand_and_their_widgets_answer(lab, capsys):
    base = {"runs": str(lab.folder / "runs"), "dtype": "float32"}
    small = {"block_length": 32, "held_out_blocks": 2, **base}
    lab.run("01_calibrate", model=lab.model, n_blocks=4, block_length=32, **base)
    calibration = lab.made("calibrate")
    lab.close("lab-01")

    lab.run("02_prune", model=lab.model, n_blocks=4, calibration=calibration, **small)
    pruned = lab.made("prune")
    times = sorted(lab.page.evaluate(MOVED, lab.inside(".vega-bind input").element_handle()))
    with capsys.disabled():
        print(f"\nslider of 02: from move to picture {1000 * times[9]:.0f} ms (median of 19 moves)")
    assert times[9] < 0.2
    lab.close("lab-02", lab.inside(".vega-bind input"))

    lab.run("03_finetune", model=pruned, steps=2, blocks_per_step=2, **small)
    tuned = lab.made("finetune")
    lab.close("lab-03")

    lab.run("04_evaluate", model=tuned, block_length=32, n_blocks=4, tasks=["facts"], limit=5, **base)
    assert lab.made("evaluate")
    lab.close("lab-04")

    lab.run("05_analyse_weights", model=tuned, **base)
    assert (Path(lab.made("analyse")) / "ranks.parquet").exists()
    chosen = Choice(lab, "module")
    chosen.pick("module", ["q_proj", "up_proj"], "4 of 14 rows")
    chosen.pick("value", ["kurtosis"], "Kurtosis of the weights")
    lab.close("lab-05", chosen.box)


# Each place of the slider in turn: seconds from the event to the frame in which the picture has changed.
MOVED = """async slider => {
  const chart = slider.closest('.vega-embed').querySelector('svg'), seconds = [];
  for (let value = Number(slider.max); value >= Number(slider.min); value -= Number(slider.step)) {
    seconds.push(await new Promise((done, lost) => {
      const begun = performance.now();
      const seen = new MutationObserver(() => {
        seen.disconnect();
        requestAnimationFrame(() => requestAnimationFrame(() => done((performance.now() - begun) / 1000)));
      });
      seen.observe(chart, {attributes: true, childList: true, characterData: true, subtree: true});
      slider.value = value;
      slider.dispatchEvent(new Event('input', {bubbles: true}));
      setTimeout(() => lost(new Error(`nothing moved at ${value}`)), 5000);
    }));
  }
  return seconds;
}"""


class Choice:
    """A chooser in the notebook: that which has a control of this name."""

    def __init__(self, lab, name):
        self.box = lab.inside(f".jp-OutputArea-output:has(label:text-is('{name}'))").last

    def pick(self, name, values, says):
        """Choose values of a list; then the chooser says so, and its picture is another."""
        before = self.picture()
        self.box.locator(f"div:has(> label:text-is('{name}')) select").select_option(values)
        self.box.get_by_text(says).first.wait_for()
        until(lambda: self.picture() not in ("", before), f"the picture follows {name}")

    def picture(self):
        found = self.box.locator("svg")
        return found.first.inner_html() if found.count() else ""


def test_orderings_seeds_and_layers_are_chosen_by_hand(lab):
    folder = lab.folder / "made_up"
    folder.mkdir()
    study = seal_study(folder, seeds=[0, 1], sparsities=[0.3, 0.6], analyse=True)
    fill_weights(folder / "runs")
    lab.run("06_compare_orderings", study=str(study), runs=str(folder / "runs"))
    trainings = Choice(lab, "asked")
    trainings.pick("ordering", ["prune", "prune_finetune"], "8 of 14 rows")
    trainings.pick("seed", ["1"], "4 of 14 rows")
    weights = Choice(lab, "module")
    weights.pick("ordering", ["prune"], "4 of 16 rows")
    weights.pick("value", ["kurtosis"], "Tails, layer by layer")
    keep(lab.page, "lab-06-light")
    for theme, ground in (("JupyterLab Dark", "rgb(22, 25, 29)"), ("JupyterLab Light", "rgb(255, 255, 255)")):
        lab.command("apputils:change-theme", theme=theme)
        until(lambda: lab.grounds() == {ground}, f"charts follow {theme}")  # noqa: B023
        for part in (".vega-embed", ".matrix"):
            assert lab.page.evaluate(CONTRAST, f".jp-NotebookPanel:not(.lm-mod-hidden) {part}") == []
        if theme == "JupyterLab Dark":
            weights.box.scroll_into_view_if_needed()
            keep(lab.page, "lab-06-dark")
    lab.close("lab-06", weights.box)

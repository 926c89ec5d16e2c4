"""What moves in a notebook: the live loss of a training, an explorer of orderings, a planner of studies."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
import yaml
from transformers import TrainerCallback

from pftools import files
from pftools.choosers import Pictured
from pftools.errors import PftoolsError
from pftools.notebook import project_folder
from pftools.orderings import PUBLISHED, parse_ordering
from pftools.shipped import shipped_studies
from pftools.study import Plan, costs, load_study, plan_study, run_state
from pftools.study.yaml_file import read_yaml


class LiveLoss(TrainerCallback):
    """Draws the loss curve anew while a training runs, at most once a second, in one place under the cell.

    Give it to `finetune.finetune_model(callbacks=[LiveLoss()])`. Outside a notebook it does nothing.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._shown: Any = None
        self._drawn = 0.0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        from IPython import get_ipython
        from IPython.display import display

        if get_ipython() is None or not logs or "loss" not in logs:
            return
        self._rows.append({"tokens": state.num_input_tokens_seen, "loss": float(logs["loss"])})
        if len(self._rows) < 2 or time.monotonic() - self._drawn < 1:
            return
        from pftools import figures

        self._drawn = time.monotonic()
        chart = figures.loss_curve(
            pd.DataFrame(self._rows), title=f"Training loss, step {state.global_step} of {state.max_steps}"
        )
        chart = chart.properties(height=180)
        if self._shown is None:
            self._shown = display(chart, display_id=True)
        else:
            self._shown.update(chart)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._shown is not None:
            from IPython.display import HTML

            self._shown.update(HTML(""))  # the finished curve follows in a cell of its own


class OrderingExplorer(Pictured):
    """A box to type an ordering into, a slider for the sparsity, and the steps that they stand for.

    Attributes:
        fields: {name: control} of ordering, sparsity and schedule.
        said: the steps in letters, or what is wrong with the word.
        stairs: the drawing, SVG.
    """

    def __init__(self, ordering: str = "iter_pf", sparsity: float = 0.5) -> None:
        word = ipywidgets.Combobox(
            value=ordering,
            options=list(PUBLISHED),
            ensure_option=False,
            description="ordering",
            continuous_update=True,
        )
        target = ipywidgets.FloatSlider(
            value=sparsity, min=0, max=0.9, step=0.05, description="sparsity", readout_format=".0%"
        )
        schedule = ipywidgets.ToggleButtons(options=["linear", "cubic"], description="schedule")
        self.fields = {"ordering": word, "sparsity": target, "schedule": schedule}
        self.said, self.stairs = ipywidgets.HTML(), ipywidgets.HTML()
        for field in self.fields.values():
            field.observe(lambda _: self._draw(), "value")
        super().__init__([*self.fields.values(), self.said, self.stairs])
        self._draw()

    def _draw(self) -> None:
        from pftools import figures

        word, target, schedule = (field.value for field in self.fields.values())
        try:
            steps = parse_ordering(word).steps(target, schedule=schedule)
        except PftoolsError as error:
            self.said.value = f"<span style='color:#b3541e'>{escape(str(error))}</span>"
            return
        letters = " ".join(step.kind for step in steps) or "no step: the model as it is"
        self.said.value = f"<code>{letters}</code>"
        self._drawing = figures.as_svg(figures.ordering_chart(steps))
        self.stairs.value = figures.drawn_on_both_grounds(self._drawing)

    def still(self) -> dict[str, Any]:
        """The stairs."""
        return {"image/svg+xml": self._drawing}


class StudyPlanner(Pictured):
    """Plan a study by hand: what it costs is told as it is typed; then save, start, watch and stop it.

    Args:
        study: the file to begin with. What has no control here stays as it says.
        runs: the folder of run folders.

    Attributes:
        fields: {name: control} of name, model, orderings, sparsities, methods, seeds and tokens; a list has
            commas between.
        said, states, report: what the study costs, where its steps are, and its report once it is finished.
    """

    _LISTS = {"orderings": str, "sparsities": float, "methods": str, "seeds": int}

    def __init__(self, study: str | Path, *, runs: str | Path = "runs") -> None:
        begun = load_study(study).model_dump(mode="json")
        path = Path(shipped_studies().get(str(study), study))
        self._given = dict(read_yaml(path).content)
        self._runs, self._folder = str(runs), path.parent
        self._process: subprocess.Popen[bytes] | None = None
        self.fields: dict[str, Any] = {}
        for name in ("name", "model", *self._LISTS, "tokens"):
            value = self._given.get(name, begun[name])
            if isinstance(value, dict) or (
                isinstance(value, list) and any(isinstance(one, dict) for one in value)
            ):
                continue
            kind = ipywidgets.IntText if name == "tokens" else ipywidgets.Text
            written = ", ".join(map(str, value)) if isinstance(value, list) else value
            self.fields[name] = kind(value=written, description=name, layout={"width": "96%"})
        self.said, self.states, self.report = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.save = ipywidgets.Button(description="Save", tooltip="write the study file")
        self.start = ipywidgets.Button(description="Start", tooltip="save, and run the missing steps")
        self.stop = ipywidgets.Button(description="Stop", disabled=True, tooltip="what is finished is kept")
        self.save.on_click(lambda _: self.write())
        self.start.on_click(lambda _: self._begin())
        self.stop.on_click(lambda _: self._end())
        for field in self.fields.values():
            field.observe(lambda _: self.tell(), "value")
        buttons = ipywidgets.HBox([self.save, self.start, self.stop])
        super().__init__([*self.fields.values(), self.said, buttons, self.states, self.report])
        self.tell()

    def still(self) -> dict[str, Any]:
        """What the study would cost."""
        return {"text/html": f"<p>{self.said.value}</p>"}

    def words(self) -> dict[str, Any]:
        """The study as its file would say it.

        Raises:
            PftoolsError: a list holds what is no number.
        """
        words = dict(self._given)
        for name, field in self.fields.items():
            kind = self._LISTS.get(name)
            try:
                given = [one.strip() for one in str(field.value).split(",") if one.strip()]
                words[name] = [kind(one) for one in given] if kind else field.value
            except ValueError:
                raise PftoolsError(f"{name} is {field.value!r}: give numbers with commas between.") from None
        return words

    @property
    def file(self) -> Path:
        """Where `write` puts the study: beside the one to begin with, under its own name."""
        return self._folder / f"{self.fields['name'].value}.yaml"

    def plan(self) -> Plan:
        """The plan of what is typed; nothing is written but a draft that is removed again."""
        draft = files.partial_path(self.file)
        try:
            draft.write_text(yaml.safe_dump(self.words(), sort_keys=False), encoding="utf-8")
            return plan_study(load_study(draft), runs=self._runs)
        except PftoolsError as error:
            raise PftoolsError(str(error).replace(str(draft), str(self.file))) from None
        finally:
            draft.unlink(missing_ok=True)

    def tell(self) -> None:
        """Say what the study would cost, or what is wrong with it."""
        try:
            lines = costs.summary(self.plan())
        except PftoolsError as error:
            self.said.value = f"<span style='color:#b3541e'>{escape(str(error))}</span>"
            self.save.disabled = self.start.disabled = True
            return
        self.said.value = "<br>".join(map(escape, lines))
        self.save.disabled = False
        self.start.disabled = self._process is not None

    def write(self) -> Path:
        """Write the study file, and say where it is."""
        files.write_text(self.file, yaml.safe_dump(self.words(), sort_keys=False))
        self.states.value = f"Saved as <code>{escape(str(self.file))}</code>."
        return self.file

    def _command(self) -> list[str]:
        # A kernel ignores the signal that stops a program, and so would what it starts.
        run = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        run += "; from pftools.cli import main; main()"
        return [sys.executable, "-c", run, "run", str(self.file), "--runs", self._runs]

    def _begin(self) -> None:
        self.write()
        self._process = subprocess.Popen(
            self._command(),
            cwd=project_folder(),  # where its report goes, too
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.start.disabled, self.stop.disabled = True, False
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()

    def _end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        plan = plan_study(load_study(self.file), runs=self._runs)
        while process.poll() is None:
            self.states.value = _states(plan)
            time.sleep(1)
        self.states.value = _states(plan)
        if process.returncode == 0:
            self.report.value = _framed(project_folder() / "reports" / plan.study.name / "index.html")
        self._process = None
        self.start.disabled, self.stop.disabled = False, True


def _framed(page: Path) -> str:
    """A report's page in a frame of its own, which needs no server."""
    inside = escape(page.read_text(encoding="utf-8"))
    frame = f'<iframe title="The report" srcdoc="{inside}" style="width: 100%; height: 720px"></iframe>'
    return f"The report is <code>{escape(str(page))}</code>.<br>{frame}"


def _states(plan: Plan) -> str:
    """A row a step with its state, and a bar of those that are finished."""
    states = {name: run_state(step.folder) for name, step in plan.steps.items()}
    done = sum(state == "finished" for state in states.values())
    rows = "".join(
        f"<tr><td>{escape(plan.steps[name].label)}</td><td>{name}</td><td>{state}</td></tr>"
        for name, state in states.items()
    )
    bar = f"<progress max={len(states)} value={done}></progress> {done} of {len(states)} steps are finished"
    return f"{bar}<table><tr><th>does</th><th>run</th><th>state</th></tr>{rows}</table>"

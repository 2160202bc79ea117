"""How commands are put together, and what they show is judged."""

from __future__ import annotations

import json
from collections.abc import Callable

from kuberay.gcp.plan import Command, Step, StepError, Values, expand
from kuberay.gcp.settings import Settings


def gcloud(s: Settings, *words: str, show: str = "", **flags: str) -> Command:
    """`gcloud WORDS --flag=value …`, on the project; a `_` in a flag's name is a `-`."""
    named = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    # `gcloud projects` has the project as its argument.
    project = [] if words[0] == "projects" else [f"--project={s.project}"]
    shown = [f"--format={show}"] if show else []
    return Command(("gcloud", *words, *named, *project, *shown))


def expects(*wanted: str, otherwise: str) -> Callable[[str, Values], bool]:
    """Refuse what is there but is something else."""

    def check(shown: str, values: Values) -> bool:
        if shown not in wanted:
            raise StepError(f"is there as {shown or 'nothing'}, not {wanted[0]}: {otherwise}")
        return True

    return check


def has_binding(policy: str, role: str, member: str) -> bool:
    """Whether an IAM policy, in JSON, gives the role to the member unconditionally."""
    return any(
        binding["role"] == role and member in binding["members"] and "condition" not in binding
        for binding in json.loads(policy).get("bindings", [])
    )


def grant(
    s: Settings, title: str, on: tuple[str, ...], role: str, member: str, **flags: str
) -> Step:
    """A role for a member on a resource; `on` is gcloud's group of commands, then the resource."""
    *group, resource = on
    # A project's policy may have conditions, and gcloud then wants to hear that this has none.
    condition = {"condition": "None"} if group == ["projects"] else {}
    return Step(
        title,
        look=gcloud(s, *group, "get-iam-policy", resource, show="json", **flags),
        change=gcloud(
            s,
            *group,
            "add-iam-policy-binding",
            resource,
            **flags,
            role=role,
            member=member,
            **condition,
        ),
        as_wanted=lambda shown, values: has_binding(shown, role, expand(member, values)),
    )

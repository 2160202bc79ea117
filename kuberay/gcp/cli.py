"""The command line of `bootstrap`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from kuberay.gcp import names
from kuberay.gcp.plan import StepError, expand, run, script
from kuberay.gcp.settings import Settings, SettingsError, read
from kuberay.gcp.steps import plan

SETTINGS = Path(__file__).with_name("settings.env")


def main() -> int:
    """Exit status: 0 done, 1 a step failed, 2 the settings or the command line are wrong."""
    parser = argparse.ArgumentParser(
        prog="bootstrap",
        description="Prints, or with --run does, what makes a Google Cloud project ready for "
        "t5-serve. Done once; to do it again changes only what is not as the settings say.",
    )
    parser.add_argument("--run", action="store_true", help="do it, instead of printing it")
    parser.add_argument(
        "--settings",
        type=Path,
        default=SETTINGS,
        metavar="FILE",
        help="default: settings.env beside this program; settings.env.example explains it",
    )
    parser.add_argument(
        "--with-key",
        type=Path,
        metavar="FILE",
        help="where GitHub cannot be federated: no identity pool, but a key of the CI account, "
        "written to FILE",
    )
    options = parser.parse_args()
    try:
        settings = read(options.settings)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    key_file = str(options.with_key.resolve()) if options.with_key else None
    steps = plan(settings, key_file)
    if not options.run:
        print("# What bootstrap --run does, from the root of the repository. It also looks at what")
        print("# is there, leaves what is as wanted, and stops at what it would not have made so.")
        print(script(steps))
        print("# bootstrap --run then says:\n#")
        print("\n".join(f"# {line}".rstrip() for line in report(settings, key_file).splitlines()))
        return 0
    try:
        values = run(steps, sys.stderr)
    except StepError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        print("bootstrap: what is done stays; run it again to go on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbootstrap: interrupted; run it again to go on from here", file=sys.stderr)
        return 1
    print(expand(report(settings, key_file), values))
    return 0


def report(s: Settings, key_file: str | None) -> str:
    """What to do next; values that Google decides stand as `$NAME`."""
    variables = {
        "GCP_PROJECT": s.project,
        "GCP_REGION": s.region,
        "GCP_REGISTRY": s.registry,
        "GCP_SERVICE_ACCOUNT": s.account(names.CI),
        "GCP_WIF_PROVIDER": "projects/$PROJECT_NUMBER/locations/global/workloadIdentityPools/"
        f"{names.POOL}/providers/{names.PROVIDER}",
        "ARGOCD_SERVER": s.argocd_server,
    }
    if key_file:
        del variables["GCP_WIF_PROVIDER"]  # with it set, workflows would not look at the key
    lines = ["GitHub: the workflows' variables", ""]
    lines += [
        f"gh variable set {name} --repo {s.repository} --body {value}"
        for name, value in variables.items()
    ]
    if key_file:
        quoted = shlex.quote(key_file)
        lines += [f"gh secret set GCP_SA_KEY --repo {s.repository} < {quoted}"]
        lines += [f"rm {quoted}"]
    lines += [
        "",
        "Values of helm/t5-summarizer",
        "",
        "image:",
        f"  repository: {s.registry}/{s.project}/{names.IMAGES}/{names.IMAGE}",
        "ingress:",
        f"  host: {s.host}",
        "",
        "Values of helm/nginx-ingress: $ADDRESS, by its name",
        "",
        "controller:",
        "  service:",
        "    loadBalancerClass: networking.gke.io/l4-regional-external",
        "    annotations:",
        f"      networking.gke.io/load-balancer-ip-addresses: {names.ADDRESS}",
        "",
        "Annotation of cert-manager's service account",
        "",
        f"iam.gke.io/gcp-service-account: {s.account(names.DNS)}",
        "",
        f"If {s.dns_domain} is not delegated to this zone yet, its name servers are",
        "",
        "$NAME_SERVERS",
        "",
        "The cluster, for kubectl",
        "",
        f"gcloud container clusters get-credentials {s.cluster} --location={s.region} "
        f"--project={s.project} --dns-endpoint",
    ]
    return "\n".join(lines)

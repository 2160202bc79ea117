# What the scripts beside it share; they source it.
# shellcheck shell=bash
set -euo pipefail

# shellcheck disable=SC2034  # used by those who source it
ROOT=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)

# An error is one line; on GitHub it is an annotation of the run, too.
_error() { printf '%s%s: %s\n' "${GITHUB_ACTIONS:+::error::}" "${0##*/}" "$*" >&2; }
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
fail() { _error "$@" && exit 1; }
usage() { _error "$@" && exit 2; }

need() {
    command -v "$1" >/dev/null || usage "$1 is not here: $2"
}

# A value for the workflow's later steps.
output() {
    [[ $2 != *$'\n'* ]] || fail "output $1 has more than one line"
    [ -z "${GITHUB_OUTPUT:-}" ] || printf '%s=%s\n' "$1" "$2" >>"$GITHUB_OUTPUT"
}

# sha256:… of what comes in.
digest() {
    local sum
    sum=$(sha256sum)
    printf 'sha256:%s\n' "${sum%% *}"
}

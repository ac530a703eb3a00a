#!/usr/bin/env bash
# The first thing to run on a rented server: is this machine sound, and what has to be done before training? A minute.
#
#   bash check_machine.sh                              before setup.sh or after it
#   bash check_machine.sh --train                      three steps of SFT, DPO, RM and PPO on every GPU too: some minutes
#   bash check_machine.sh --output_dir FOLDER          where the runs will write, if not in this project
#
# One line for each thing: fine, note (a run goes on, but not as one might think) or wrong, with what to do. The exit code
# is 1 where something is wrong.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python || echo python3)}
script=$PWD/scripts/check_machine.py

cd "$OLDPWD" # FOLDER is the caller's
exec "$PYTHON" "$script" "$@"

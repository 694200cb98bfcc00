#!/usr/bin/env bash
#SBATCH --job-name=orpo-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
# Run a recipe on a Slurm allocation:
#   sbatch --gpus-per-node=8 cluster/slurm.sh recipes/smolvlm-500m-lora.yaml checkpoint.storage=/shared/runs
# One Ray node is started for each node of the allocation; the command runs on the first. Submitting again resumes.
# The environment must be active (`source .venv/bin/activate`) and in a folder that all nodes mount, as must this one.
# Another command than `train`: ORPO_RAY_COMMAND=tune sbatch cluster/slurm.sh RECIPE
set -euo pipefail
umask 077

# The token of this allocation. A job's environment is for its user alone; arguments of commands are not.
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"

head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
head_ip="$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" python -c 'import ray.util; print(ray.util.get_node_ip_address())')"
# Two allocations may share a node, so the port depends on the job; not 10002 to 19999, which are for workers.
port=$((20000 + SLURM_JOB_ID % 10000))
cpus="${SLURM_CPUS_PER_TASK:-1}"
# Since Slurm 22.05, a step gets one CPU per task unless its srun asks for more; the job's own number is not passed on.
ray_step=(srun --overlap --cpus-per-task="$cpus")

# shellcheck disable=SC2329 # called by the trap
stop() {
  if [[ -n "${train:-}" ]]; then
    kill -TERM "$train" 2>/dev/null || true # saves a checkpoint and ends
    wait "$train" || true
  fi
}
trap stop TERM INT

export RAY_ADDRESS="$head_ip:$port"
nodes="${SLURM_JOB_NUM_NODES:-1}"
wait_for_nodes() {
  python - "$1" <<'PYTHON'
import sys, time
import ray

deadline = time.monotonic() + 300
while True:
    try:
        ray.init(log_to_driver=False, logging_level="error")
        break
    except ConnectionError:
        if time.monotonic() > deadline:
            sys.exit("Ray's head did not start within 300 s; see its log in RAY_TMPDIR on the first node")
        time.sleep(2)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    if time.monotonic() > deadline:
        sys.exit(f"only {len(ray.nodes())} of {sys.argv[1]} nodes joined within 300 s")
    time.sleep(2)
PYTHON
}

# `--overlap` lets the command below share the head's node with this step.
"${ray_step[@]}" --nodes=1 --ntasks=1 --nodelist="$head_node" \
  ray start --head --block --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1 \
  --dashboard-port=$((port + 10000)) --ray-client-server-port=$((port + 20000)) --num-cpus="$cpus" --disable-usage-stats &
wait_for_nodes 1 # the others would give up
if ((nodes > 1)); then
  "${ray_step[@]}" --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --ntasks-per-node=1 --exclude="$head_node" \
    ray start --block --address="$RAY_ADDRESS" --num-cpus="$cpus" --disable-usage-stats &
  wait_for_nodes "$nodes"
fi

# Not under srun, so that this script passes signals on. In the background, as bash handles none while it waits.
read -ra command <<<"${ORPO_RAY_COMMAND:-train}"
orpo-ray "${command[@]}" "$@" &
train=$!
status=0
wait "$train" || status=$?
exit "$status"

#!/usr/bin/env bash
# Runs launch/slurm.sh under a real one-node Slurm on this machine: two tasks, CPU, gloo, a tiny model. One of them gets
# SIGTERM on the way, so the job is requeued once. Needs root and Debian's slurm-wlm and munge:
#
#     apt-get install slurm-wlm munge && launch/tests/slurm.sh [FOLDER]
#
# PYTHON: the interpreter that has mythos_jax (default: .venv/bin/python).
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"/{state,spool,shared}
pids=() job=
end() {
    [ -z "$job" ] || { scancel "$job" && sleep 2; } 2>/dev/null || true
    kill "${pids[@]}" 2>/dev/null || true
}
trap end EXIT

# munge needs its own key and socket, owned by the user who runs it.
chmod 755 "$folder"
dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
chmod 400 "$folder/munge.key"
munged --foreground --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
    --log-file "$folder/munged.log" --seed-file "$folder/munge.seed" &
pids+=($!)

host=$(hostname -s)
cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
sleep 1
slurmctld -D &
pids+=($!)
slurmd -D -N "$host" &
pids+=($!)
for _ in $(seq 60); do
    sinfo -h -o %T 2>/dev/null | grep -q idle && break
    sleep 1
done
sinfo

# The `mythos` command that slurm.sh and the job call.
mythos=$folder/mythos
printf '#!/bin/sh\nexec "%s" -m mythos_jax "$@"\n' "$python" > "$mythos"
chmod +x "$mythos"
export MYTHOS=$mythos PYTHONPATH=$root JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 SHARED=$folder/shared NAME=tiny
cd "$folder"
steps=600 every=50
cat > tiny.yaml <<YAML
model: {vocab_size: 264, dim: 32, max_seq_len: 32, loops: 2, n_heads: 2, n_kv_heads: 1, hidden_dim: 48}
training: {steps: $steps, batch_size: 8, log_every: $every, checkpoint_every: 1000, warmup_steps: 2}
evaluation: {batch_size: 8, max_rows: 16, loops: [1, 2]}
data: {sources: [$root/docs], path: $folder/data, seq_len: 16, held_out_fraction: 0.2}
YAML
submitted=$(NODES=1 TASKS=2 GPUS=0 RESTARTS=2 GRACE=60 "$root/launch/slurm.sh" "$folder/tiny.yaml")
echo "$submitted"
job=$(grep -o 'job [0-9]*' <<<"$submitted" | grep -o '[0-9]*')
log=$folder/shared/runs/tiny/metrics.jsonl

for _ in $(seq 2400); do
    grep -qs "\"step\": $every," "$log" && break
    sleep 0.1
done
victim=$(pgrep -f "mythos_jax train $folder/tiny.yaml --workdir $folder" | tail -n 1)
echo "SIGTERM to $victim"
kill -TERM "$victim"

seconds=0
until state=$(scontrol show job "$job" | grep -o 'JobState=[A-Z_]*') && [[ $state =~ COMPLETED|FAILED|CANCELLED|TIMEOUT ]]; do
    # Slurm holds a requeued job for two minutes; the test does not wait for that.
    [ "$state" != JobState=PENDING ] || scontrol update job "$job" StartTime=now
    sleep 2
    seconds=$((seconds + 2))
    [ "$seconds" -lt 2400 ] || break
done
scontrol show job "$job" | grep -o 'JobState=[A-Z]*\|Restarts=[0-9]*\|ExitCode=[0-9:]*\|NumTasks=[0-9]*'
tr '\r' '\n' < "$folder/tiny-$job.log" | grep -v 'step/s\|Gloo' || true
logged=$(grep -o '"step": [0-9]*' "$log" | tr -dc '0-9\n')
tr "\n" " " <<<"logged: $logged"; echo
[ "$state" = JobState=COMPLETED ]
[ "$logged" = "$(echo 1 && seq "$every" "$every" "$steps")" ]
grep -q 'stopped by SIGTERM after step' "$folder/tiny-$job.log"
grep -q 'resuming' "$folder/tiny-$job.log"
echo "slurm: passed"

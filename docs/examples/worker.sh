#!/bin/sh
# A jobd worker in shell: the program that `jobctl run` starts once for each job.
#
#   jobctl submit --queue thumbs '{"source": "/srv/in/cat.txt", "target": "/srv/out/cat.txt.gz"}'
#   jobctl run --queue thumbs --once -- docs/examples/worker.sh
#
# It gets the payload as JSON on stdin and the job's fields as JOBD_JOB_* variables. Output lines that begin with ::
# control the job; all others pass through. Exit code 0 completes the job. Any other code fails it, with the last lines
# of stderr as the error message. jobctl renews the lock, and sends SIGTERM if the job is cancelled or its lock is lost.
set -eu

payload=$(cat)
source=$(printf '%s' "$payload" | jq -er .source)
target=$(printf '%s' "$payload" | jq -er .target)

# Write under a unique name, then rename: if the job runs again after a crash, it never leaves a partial file behind.
part="$target.part.$JOBD_JOB_FENCING_TOKEN"
trap 'rm -f "$part"' EXIT

echo "::progress 10 compressing $source"
gzip -9 -c -- "$source" >"$part"

echo "::progress 90 checking"
gzip -t <"$part"
mv -- "$part" "$target"

echo "::result file_path=$target"
echo "::meta bytes=$(wc -c <"$target")"

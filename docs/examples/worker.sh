#!/bin/sh
# A jobd worker in shell: this is the program that `jobctl run` starts once for each job.
#
#   jobctl submit --queue thumbs '{"source": "/srv/in/cat.txt", "target": "/srv/out/cat.txt.gz"}'
#   jobctl run --queue thumbs --once -- docs/examples/worker.sh
#
# It gets the payload as JSON on stdin and the job as JOBD_JOB_* variables. Lines that begin with :: go to jobd,
# all others pass through. Exit 0 completes the job; any other code fails it, with the last lines of stderr as reason.
# jobctl claims, keeps the lock alive and stops this program (SIGTERM) when the job is cancelled or lost.
set -eu

payload=$(cat)
source=$(printf '%s' "$payload" | jq -er .source)
target=$(printf '%s' "$payload" | jq -er .target)

# A name of its own, then a rename: a second run of the same job (after a crash) cannot leave half a file behind.
part="$target.part.$JOBD_JOB_FENCING_TOKEN"
trap 'rm -f "$part"' EXIT

echo "::progress 10 compressing $source"
gzip -9 -c -- "$source" >"$part"

echo "::progress 90 checking"
gzip -t <"$part"
mv -- "$part" "$target"

echo "::result file_path=$target"
echo "::meta bytes=$(wc -c <"$target")"

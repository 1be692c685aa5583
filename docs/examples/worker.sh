#!/bin/sh
# A jobd worker in shell: the program that `jobctl run` starts once for each job.
#
#   jobctl submit --queue archive '{"sources": ["/srv/in/cat.txt", "/srv/in/dog.txt"], "target": "/srv/out"}'
#   jobctl run --queue archive --once -- docs/examples/worker.sh
#
# It gets the payload as JSON on stdin and the job's fields as JOBD_JOB_* variables. Output lines that begin with ::
# control the job; all others pass through. Exit code 0 completes the job. Any other code fails it, with the last lines
# of stderr as the error message. jobctl renews the lock, and sends SIGTERM if the job is cancelled or its lock is lost.
set -eu

payload=$(cat)
target=$(printf '%s' "$payload" | jq -er .target)
count=$(printf '%s' "$payload" | jq -er '.sources | length')
trace=$(printf '%s' "${JOBD_JOB_HEADERS:-null}" | jq -r '.trace // "none"')

done=${JOBD_JOB_CHECKPOINT:-0} # number of files that earlier attempts have compressed
echo "trace $trace: from file $((done + 1)) of $count"

# Write under a unique name, then rename: if the job runs again after a crash, it never leaves a partial file behind.
part="$target/part.$JOBD_JOB_FENCING_TOKEN"
trap 'rm -f "$part"' EXIT

while [ "$done" -lt "$count" ]; do
    source=$(printf '%s' "$payload" | jq -er --argjson at "$done" '.sources[$at]')
    gzip -9 -c -- "$source" >"$part"
    gzip -t <"$part"
    mv -- "$part" "$target/$(basename -- "$source").gz"
    done=$((done + 1))
    echo "::checkpoint $done"
    echo "::progress $((100 * done / count)) compressed $source"
done

echo "::result file_path=$target"
echo "::meta files=$count"

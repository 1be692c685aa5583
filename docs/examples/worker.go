// A jobd worker in Go, with the standard library only.
//
//	go run docs/examples/worker.go                   over the Unix socket (JOBD_SOCKET, /run/jobd/worker.sock)
//	JOBD_URL=http://127.0.0.1:8771 JOBD_WORKER_TOKEN_FILE=…  go run docs/examples/worker.go     over TCP
//
// JOBD_URL may have the URLs of all nodes of a cluster, separated by commas. Calls then go to the node that leads.
// It works on jobs of the queue `default`, one at a time, and continues a job where its last attempt stopped. On SIGTERM
// it finishes the current job, then exits (within 5 s if it is idle). With ONCE=1 it exits after one job.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

type Job struct {
	ID         string            `json:"id"`
	Kind       string            `json:"kind"`
	Payload    json.RawMessage   `json:"payload"`
	Headers    map[string]string `json:"headers"`    // what the creator sent, such as a trace
	Checkpoint json.RawMessage   `json:"checkpoint"` // of an earlier attempt
}

type Grant struct {
	Job    Job    `json:"job"`
	LockID string `json:"lock_id"`
	TTLMs  int    `json:"ttl_ms"`
}

// APIError is an error response. Code is stable (lock_lost, already_locked, …); Message is for people.
type APIError struct {
	Code    string `json:"error"`
	Message string `json:"message"`
	Details struct {
		Leader string `json:"leader"`
	} `json:"details"`
}

func (e *APIError) Error() string { return e.Message }

type object = map[string]any

var (
	nodes   = []string{"http://jobd"} // the name has no meaning: the socket determines the daemon
	current = 0                       // index of the node that served the last call
	token   string
	client  = http.Client{Timeout: 15 * time.Second} // a claim waits 5 s
)

// isTemporary reports whether the call may succeed later, or on another node.
func isTemporary(err error) bool {
	var response *APIError
	return !errors.As(err, &response) ||
		slices.Contains([]string{"not_leader", "overloaded", "shutting_down", "outcome_unknown"}, response.Code)
}

// call makes one call. The error is an *APIError for an error response, and another one if no daemon is reachable. With
// several URLs the other nodes are tried, too. This is safe: repeated endings and claims get the same response.
func call(path string, body object, data any, key string) (err error) {
	for range nodes {
		if err = callNode(nodes[current]+path, body, data, key); err == nil || !isTemporary(err) {
			return err
		}
		var response *APIError
		next := (current + 1) % len(nodes)
		if errors.As(err, &response) && response.Details.Leader != "" {
			if leader := slices.Index(nodes, strings.TrimSuffix(response.Details.Leader, "/")); leader >= 0 {
				next = leader
			}
		}
		current = next
	}
	return err
}

func callNode(url string, body object, data any, key string) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequest("POST", url, bytes.NewReader(text))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	var answer struct {
		APIError
		Success bool            `json:"success"`
		Data    json.RawMessage `json:"data"`
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		return err
	}
	if !answer.Success {
		return &answer.APIError
	}
	return json.Unmarshal(answer.Data, data)
}

// insist repeats a call until there is a response. This is safe: a repeated ending gets the same response.
func insist(path string, body object) error {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		err := call(path, body, &object{}, "")
		if err == nil || !isTemporary(err) {
			return err
		}
		time.Sleep(pause)
	}
}

// The state of the work, kept as the checkpoint of the job.
type Sum struct {
	Done int     `json:"done"`
	Sum  float64 `json:"sum"`
}

// work does the work itself. It continues at the checkpoint, and ends early when ctx is done: write nothing more then.
func work(ctx context.Context, job Job, report func(percent int, message string, checkpoint any)) (object, error) {
	var numbers []float64
	if err := json.Unmarshal(job.Payload, &numbers); err != nil {
		return nil, fmt.Errorf("the payload is not a list of numbers: %w", err)
	}
	var state Sum
	if job.Checkpoint != nil {
		if err := json.Unmarshal(job.Checkpoint, &state); err != nil {
			return nil, err
		}
	}
	for state.Done < len(numbers) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		number := numbers[state.Done]
		state = Sum{state.Done + 1, state.Sum + number}
		report(100*state.Done/len(numbers), fmt.Sprintf("added %v", number), state)
	}
	return object{"metadata": object{"sum": state.Sum, "count": len(numbers)}}, nil
}

func run(grant Grant) {
	at := "/v1/jobs/" + url.PathEscape(grant.Job.ID)
	ctx, lose := context.WithCancelCause(context.Background())
	renewals := make(chan object) // one goroutine makes all calls about the lock, one after another
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		timer := time.NewTicker(time.Duration(grant.TTLMs) * time.Millisecond / 3)
		defer timer.Stop()
		for {
			verb, body := "/extend", object{}
			select {
			case <-timer.C:
			case next, more := <-renewals:
				if !more {
					return
				}
				verb, body = "/progress", next
			}
			body["lock_id"] = grant.LockID
			// After a temporary error the lock is still live, and the next call may succeed.
			if err := call(at+verb, body, &object{}, ""); err != nil && !isTemporary(err) {
				lose(err)
			}
		}
	}()
	result, err := work(ctx, grant.Job, func(percent int, message string, checkpoint any) {
		renewals <- object{"progress": percent, "message": message, "checkpoint": checkpoint}
	})
	close(renewals)
	<-ended
	if err == nil && ctx.Err() == nil {
		result["lock_id"] = grant.LockID
		err = insist(at+"/complete", result)
	} else if ctx.Err() == nil {
		err = errors.Join(err, insist(at+"/fail", object{"lock_id": grant.LockID, "error_message": err.Error()}))
	} else {
		err = context.Cause(ctx)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", grant.Job.ID, err)
		return
	}
	fmt.Println(grant.Job.ID, "completed", grant.Job.Headers["trace"])
}

func connect() error {
	if list := os.Getenv("JOBD_URL"); list != "" {
		nodes = nil
		for _, each := range strings.Split(list, ",") {
			nodes = append(nodes, strings.TrimSuffix(strings.TrimSpace(each), "/"))
		}
	} else {
		socket := os.Getenv("JOBD_SOCKET")
		if socket == "" {
			socket = "/run/jobd/worker.sock"
		}
		client.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}
	}
	if file := os.Getenv("JOBD_WORKER_TOKEN_FILE"); file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		token, _, _ = strings.Cut(strings.TrimSpace(string(text)), "\n")
	}
	return nil
}

func main() {
	if err := connect(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(78)
	}
	stop, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	host, _ := os.Hostname()
	// stall_after_ms 0: this worker extends its locks, so an expired lock means that it is dead.
	// progress_timeout_ms 0: no progress timeout, so work without progress reports can take long.
	ask := object{"worker": fmt.Sprintf("%s-%d", host, os.Getpid()), "lock_ttl_ms": 60_000,
		"stall_after_ms": 0, "progress_timeout_ms": 0, "wait_ms": 5_000}
	key := rand.Text() // idempotency key of the claim: if the response is lost, the repeat gets the same grants
	for stop.Err() == nil {
		var claimed struct{ Grants []Grant }
		if err := call("/v1/claim", ask, &claimed, key); err != nil {
			fmt.Fprintln(os.Stderr, "cannot claim:", err)
			time.Sleep(time.Second)
			continue
		}
		key = rand.Text()
		for _, grant := range claimed.Grants {
			run(grant)
		}
		if os.Getenv("ONCE") != "" && len(claimed.Grants) > 0 {
			return
		}
	}
}

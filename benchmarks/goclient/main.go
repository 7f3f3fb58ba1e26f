// Command goclient does with containerd's Go client what the bench asks of every peer: it reads one request a line from its
// standard input, and answers each with one line. See benchmarks/protocol.py for the requests.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd"
	apievents "github.com/containerd/containerd/api/events"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/cio"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/typeurl"
	"github.com/gogo/protobuf/types"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

type request struct {
	Do      string  `json:"do"`
	Count   int     `json:"count"`
	Workers int     `json:"workers"`
	Bytes   int64   `json:"bytes"`
	Into    string  `json:"into"`
	Seconds float64 `json:"seconds"`
	Of      string  `json:"of"`
	First   int     `json:"first"`
}

type answer map[string]any

type peer struct {
	client    *containerd.Client
	ctx       context.Context
	spec      specs.Spec
	directory string
	number    int
	held      containerd.Container
	task      containerd.Task
	seen      chan answer
}

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: goclient ADDRESS NAMESPACE DIRECTORY")
		os.Exit(2)
	}
	client, err := containerd.New(os.Args[1])
	check(err)
	p := &peer{client: client, directory: os.Args[3]}
	p.ctx = namespaces.WithNamespace(context.Background(), os.Args[2])
	text, err := os.ReadFile(filepath.Join(p.directory, "spec.json"))
	check(err)
	check(json.Unmarshal(text, &p.spec))
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var asked request
		check(json.Unmarshal(lines.Bytes(), &asked))
		if asked.Do == "quit" {
			break
		}
		told, err := json.Marshal(p.answer(asked))
		check(err)
		fmt.Println(string(told))
	}
	check(client.Close())
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "goclient:", err)
		os.Exit(1)
	}
}

func cpu() float64 {
	var usage syscall.Rusage
	check(syscall.Getrusage(syscall.RUSAGE_SELF, &usage))
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}

// timed says what a piece of work has taken: seconds by the clock, and of this process's CPU.
func timed(work func()) answer {
	began, used := time.Now(), cpu()
	work()
	return answer{"wall": time.Since(began).Seconds(), "cpu": cpu() - used}
}

func (p *peer) answer(asked request) answer {
	switch asked.Do {
	case "lifecycle":
		first := p.number
		p.number += asked.Count
		return timed(func() { p.lifecycles(first, asked.Count, asked.Workers) })
	case "hold":
		p.held = p.create("held", "/bin/sleep", "100000")
		task, err := p.held.NewTask(p.ctx, cio.NullIO)
		check(err)
		check(task.Start(p.ctx))
		p.task = task
	case "release":
		exited, err := p.task.Wait(p.ctx)
		check(err)
		check(p.task.Kill(p.ctx, syscall.SIGKILL))
		<-exited
		_, err = p.task.Delete(p.ctx)
		check(err)
		check(p.held.Delete(p.ctx))
	case "exec":
		first := p.number
		p.number += asked.Count
		return timed(func() {
			for each := first; each < first+asked.Count; each++ {
				p.exec(fmt.Sprintf("e%d", each))
			}
		})
	case "stdout":
		return p.stdout(asked)
	case "calls":
		return timed(func() { p.calls(asked) })
	case "publish":
		return timed(func() { p.publish(asked) })
	case "subscribe":
		p.subscribe(asked.Count, asked.Of)
	case "events":
		return <-p.seen
	case "idle":
		return timed(func() { time.Sleep(time.Duration(asked.Seconds * float64(time.Second))) })
	default:
		check(fmt.Errorf("no such request: %s", asked.Do))
	}
	return answer{}
}

func (p *peer) create(id string, args ...string) containerd.Container {
	spec := p.spec
	process := *p.spec.Process
	process.Args = args
	spec.Process = &process
	made, err := p.client.NewContainer(p.ctx, id, containerd.WithSpec(&spec))
	check(err)
	return made
}

// run makes a container with FIFOs, starts it, reads its output to the end, waits, and deletes both.
func (p *peer) run(id string, stdout io.Writer, args ...string) {
	container := p.create(id, args...)
	streams := cio.NewCreator(cio.WithStreams(nil, stdout, io.Discard), cio.WithFIFODir(p.directory))
	task, err := container.NewTask(p.ctx, streams)
	check(err)
	exited, err := task.Wait(p.ctx)
	check(err)
	check(task.Start(p.ctx))
	check((<-exited).Error())
	_, err = task.Delete(p.ctx)
	check(err)
	check(container.Delete(p.ctx))
}

func (p *peer) lifecycles(first, count, workers int) {
	ids := make(chan string)
	var all sync.WaitGroup
	for each := 0; each < workers; each++ {
		all.Add(1)
		go func() {
			defer all.Done()
			for id := range ids {
				p.run(id, io.Discard, "/bin/true")
			}
		}()
	}
	for each := first; each < first+count; each++ {
		ids <- fmt.Sprintf("c%d", each)
	}
	close(ids)
	all.Wait()
}

func (p *peer) exec(id string) {
	process := *p.spec.Process
	process.Args = []string{"/bin/true"}
	streams := cio.NewCreator(cio.WithStreams(nil, io.Discard, io.Discard), cio.WithFIFODir(p.directory))
	started, err := p.task.Exec(p.ctx, id, &process, streams)
	check(err)
	exited, err := started.Wait(p.ctx)
	check(err)
	check(started.Start(p.ctx))
	check((<-exited).Error())
	_, err = started.Delete(p.ctx)
	check(err)
}

// counter discards what it is given, as a callable of Python's would: the copier sees no more than an io.Writer.
type counter struct{ bytes int64 }

func (c *counter) Write(data []byte) (int, error) {
	c.bytes += int64(len(data))
	return len(data), nil
}

func (p *peer) stdout(asked request) answer {
	p.number++
	size := fmt.Sprint(asked.Bytes / 65536)
	args := []string{"/bin/dd", "if=/dev/zero", "bs=65536", "count=" + size}
	counted := &counter{}
	var sink io.Writer = counted
	if asked.Into == "file" {
		file, err := os.Create(filepath.Join(p.directory, "stdout"))
		check(err)
		defer file.Close()
		sink = file
	}
	told := timed(func() { p.run(fmt.Sprintf("s%d", p.number), sink, args...) })
	if file, isFile := sink.(*os.File); isFile {
		facts, err := file.Stat()
		check(err)
		counted.bytes = facts.Size()
	}
	told["bytes"] = counted.bytes
	return told
}

func (p *peer) calls(asked request) {
	tasks := p.client.TaskService()
	for each := 0; each < asked.Count; each++ {
		var err error
		switch asked.Of {
		case "version":
			_, err = p.client.Version(p.ctx)
		case "status":
			_, err = tasks.Get(p.ctx, &tasksapi.GetRequest{ContainerID: p.held.ID()})
		case "list_pids":
			_, err = tasks.ListPids(p.ctx, &tasksapi.ListPidsRequest{ContainerID: p.held.ID()})
		case "signal_process":
			_, err = tasks.Kill(p.ctx, &tasksapi.KillRequest{ContainerID: p.held.ID(), Signal: uint32(syscall.SIGWINCH)})
		}
		check(err)
	}
}

// publish sends events about containers b0, b1 ... in the namespace `of`, as often as told.
func (p *peer) publish(asked request) {
	var all sync.WaitGroup
	for worker := 0; worker < asked.Workers; worker++ {
		all.Add(1)
		go func(worker int) {
			defer all.Done()
			p.publishTo(asked.Of, worker, asked)
		}(worker)
	}
	all.Wait()
}

// publishTo sends what one of several workers has to send: all of a container's events come from one, in order.
func (p *peer) publishTo(namespace string, worker int, asked request) {
	ctx := namespaces.WithNamespace(context.Background(), namespace)
	containers := int(asked.Bytes)
	for each := 0; each < asked.Count/containers; each++ {
		for number := worker; number < containers; number += asked.Workers {
			run := asked.First + each/3 // an exit that was told before would be none
			id, exec, pid := fmt.Sprintf("b%d", number), fmt.Sprintf("e%d", run), uint32(1000000+run)
			topic, event := "/tasks/exec-added", any(&apievents.TaskExecAdded{ContainerID: id, ExecID: exec})
			switch each % 3 {
			case 1:
				topic, event = "/tasks/exec-started", &apievents.TaskExecStarted{ContainerID: id, ExecID: exec, Pid: pid}
			case 2:
				topic, event = "/tasks/exit", &apievents.TaskExit{
					ContainerID: id, ID: exec, Pid: pid, ExitStatus: 7, ExitedAt: time.Now().UTC(),
				}
			}
			packed, err := typeurl.MarshalAny(event)
			check(err)
			_, err = eventsapi.NewEventsClient(p.client.Conn()).Publish(ctx, &eventsapi.PublishRequest{
				Topic: topic, Event: &types.Any{TypeUrl: packed.TypeUrl, Value: packed.Value},
			})
			check(err)
		}
	}
}

// subscribe counts events of a namespace until there are so many; "events" then says when that was.
func (p *peer) subscribe(count int, namespace string) {
	p.seen = make(chan answer, 1)
	ctx, cancel := context.WithCancel(p.ctx)
	envelopes, failed := p.client.Subscribe(ctx, "namespace=="+namespace+",topic~=|^/tasks/|")
	time.Sleep(100 * time.Millisecond) // containerd does not say when it has begun
	used := cpu()
	go func() {
		defer cancel()
		seen := 0
		for seen < count {
			select {
			case envelope := <-envelopes:
				_, err := typeurl.UnmarshalAny(envelope.Event)
				check(err)
				seen++
			case err := <-failed:
				check(err)
			}
		}
		p.seen <- answer{"ended": float64(time.Now().UnixNano()) / 1e9, "cpu": cpu() - used}
	}()
}

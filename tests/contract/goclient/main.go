// Goclient drives a containerd with containerd's own Go client and prints what it was answered, a line each, without what
// differs from run to run: pids, times, the namespace's name. The test that runs it compares the lines of two servers.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/cio"
	"github.com/containerd/containerd/content"
	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/images"
	"github.com/containerd/containerd/leases"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/oci"
	"github.com/containerd/containerd/snapshots"
	"github.com/gogo/protobuf/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	snapshotter = "native"
	root        = "containerd.io/gc.root" // what has this label is not taken by containerd's garbage collection
	patience    = 20 * time.Second
)

type run struct {
	client    *containerd.Client
	ctx       context.Context
	namespace string
	rootfs    string
	fifos     string
	mutex     sync.Mutex
	topics    []string
}

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: goclient ADDRESS NAMESPACE ROOTFS FIFOS")
		os.Exit(2)
	}
	client, err := containerd.New(os.Args[1], containerd.WithTimeout(patience))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), os.Args[2]), 2*patience)
	defer cancel()
	r := &run{client: client, ctx: ctx, namespace: os.Args[2], rootfs: os.Args[3], fifos: os.Args[4]}
	r.subscribe()
	r.itself()
	r.containers()
	r.tasks()
	r.execs()
	r.refusals()
	r.content()
	r.images()
	r.leases()
	r.snapshots()
	r.namespaces()
	r.events()
}

// say prints a line: what was done, what came of it, and the kind and text of an error.
func (r *run) say(what string, err error, values ...interface{}) {
	line := what
	for _, value := range values {
		line += fmt.Sprintf(" %v", value)
	}
	if err != nil {
		line += fmt.Sprintf(" [%s] %s", kind(err), err)
	}
	fmt.Println(strings.ReplaceAll(line, r.namespace, "NAMESPACE"))
}

func kind(err error) string {
	for _, each := range []struct {
		name string
		is   func(error) bool
	}{
		{"not found", errdefs.IsNotFound},
		{"already exists", errdefs.IsAlreadyExists},
		{"invalid argument", errdefs.IsInvalidArgument},
		{"failed precondition", errdefs.IsFailedPrecondition},
		{"unavailable", errdefs.IsUnavailable},
		{"not implemented", errdefs.IsNotImplemented},
		{"deadline", errdefs.IsDeadlineExceeded},
	} {
		if each.is(err) {
			return each.name
		}
	}
	return "unknown"
}

// must ends the program when the way to what is compared fails.
func must(err error) {
	if err != nil {
		fmt.Println("FAILED", err)
		os.Exit(1)
	}
}

func names(found map[string]string) string {
	keys := make([]string, 0, len(found))
	for key := range found {
		keys = append(keys, key+"="+found[key])
	}
	sort.Strings(keys)
	return strings.Join(keys, ",")
}

// subscribe collects topics, and returns when the subscription is known to be live.
func (r *run) subscribe() {
	// The client's own filter syntax; a namespace without punctuation needs no quotes.
	envelopes, failures := r.client.Subscribe(r.ctx, `namespace=="`+r.namespace+`"`)
	live := make(chan struct{})
	go func() {
		seen := false
		for {
			select {
			case envelope := <-envelopes:
				if envelope.Topic == "/containers/update" && !seen {
					seen = true
					close(live)
				}
				r.mutex.Lock()
				r.topics = append(r.topics, envelope.Topic)
				r.mutex.Unlock()
			case <-failures:
				return
			}
		}
	}()
	container, err := r.client.NewContainer(r.ctx, "probe", containerd.WithNewSpec())
	must(err)
	for number := 0; ; number++ {
		_, err := container.SetLabels(r.ctx, map[string]string{"number": fmt.Sprint(number)})
		must(err)
		select {
		case <-live:
			must(container.Delete(r.ctx))
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (r *run) itself() {
	version, err := r.client.Version(r.ctx)
	r.say("version", err, version.Version[:4])
	server, err := r.client.IntrospectionService().Server(r.ctx, &types.Empty{})
	must(err)
	r.say("server", nil, len(server.UUID))
	serving, err := r.client.IsServing(r.ctx)
	r.say("serving", err, serving)
	plugins, err := r.client.IntrospectionService().Plugins(r.ctx, []string{"type==io.containerd.runtime.v2"})
	must(err)
	r.say("plugins", nil, len(plugins.Plugins), plugins.Plugins[0].ID, len(plugins.Plugins[0].Platforms))
}

func (r *run) make(id string, args ...string) (containerd.Container, error) {
	return r.client.NewContainer(
		r.ctx, id,
		containerd.WithContainerLabels(map[string]string{"of": id}),
		containerd.WithNewSpec(
			oci.WithRootFSPath(r.rootfs),
			oci.WithProcessArgs(args...),
			oci.WithEnv([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}),
			oci.WithCgroup("/libcontainerd-"+r.namespace+"-"+id),
		),
	)
}

func (r *run) containers() {
	container, err := r.make("c", "true")
	must(err)
	info, err := container.Info(r.ctx)
	r.say("info", err, info.ID, names(info.Labels), info.Runtime.Name, info.Image, info.SnapshotKey, info.Spec != nil)
	r.say("times", nil, !info.CreatedAt.IsZero(), info.CreatedAt.Equal(info.UpdatedAt))
	labels, err := container.SetLabels(r.ctx, map[string]string{"more": "x"})
	r.say("labels", err, names(labels))
	must(container.Update(r.ctx, containerd.UpdateContainerOpts(containerd.WithContainerExtension("e", &specs.Process{Cwd: "/x"}))))
	extensions, err := container.Extensions(r.ctx)
	r.say("extensions", err, len(extensions))
	spec, err := container.Spec(r.ctx)
	must(err)
	r.say("spec", nil, spec.Process.Args, spec.Root.Path == r.rootfs)
	for _, filter := range []string{"id==c", "labels.of==c", "labels.of==d", "runtime.name~=runc"} {
		found, err := r.client.Containers(r.ctx, filter)
		r.say("filter "+filter, err, len(found))
	}
	_, err = r.client.Containers(r.ctx, "id=!c")
	r.say("filter", err)
	_, err = r.make("c", "true")
	r.say("twice", err)
	_, err = r.make("a/b", "true")
	r.say("name", err)
	_, err = container.Task(r.ctx, nil)
	r.say("task", err)
	r.say("delete", container.Delete(r.ctx))
	r.say("delete", container.Delete(r.ctx))
	_, err = r.client.LoadContainer(r.ctx, "c")
	r.say("load", err)
}

type output struct {
	mutex sync.Mutex
	data  bytes.Buffer
}

func (o *output) Write(data []byte) (int, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.data.Write(data)
}

func (o *output) String() string {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.data.String()
}

func (o *output) await(text string) {
	for end := time.Now().Add(patience); !strings.Contains(o.String(), text); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			must(fmt.Errorf("%q did not come, but %q", text, o.String()))
		}
	}
}

func (r *run) creator(stdin io.Reader, out, err io.Writer, options ...cio.Opt) cio.Creator {
	return cio.NewCreator(append([]cio.Opt{cio.WithStreams(stdin, out, err), cio.WithFIFODir(r.fifos)}, options...)...)
}

func (r *run) tasks() {
	container, err := r.make("t", "sh", "-c", "echo out; echo err >&2; cat; exit 7")
	must(err)
	var out, errs output
	input, feed := io.Pipe()
	task, err := container.NewTask(r.ctx, r.creator(input, &out, &errs))
	must(err)
	status, err := task.Status(r.ctx)
	r.say("created", err, status.Status, status.ExitStatus)
	_, err = container.NewTask(r.ctx, cio.NullIO)
	r.say("second task", err)
	r.say("pause", task.Pause(r.ctx))
	exited, err := task.Wait(r.ctx)
	must(err)
	must(task.Start(r.ctx))
	// Past the client, which closes its stdio when a start fails.
	_, err = r.client.TaskService().Start(r.ctx, &tasks.StartRequest{ContainerID: "t"})
	r.say("start", errdefs.FromGRPC(err))
	status, err = task.Status(r.ctx)
	r.say("started", err, status.Status, task.Pid() > 0, task.ID())
	out.await("out\n")
	errs.await("err\n")
	_, err = feed.Write([]byte("fed\n"))
	must(err)
	out.await("fed\n")
	_, err = task.Delete(r.ctx)
	r.say("delete", err)
	r.say("container delete", container.Delete(r.ctx, containerd.WithSnapshotCleanup))
	must(task.Pause(r.ctx))
	status, err = task.Status(r.ctx)
	r.say("paused", err, status.Status)
	r.say("pause", task.Pause(r.ctx))
	_, err = task.Exec(r.ctx, "frozen", process("true"), cio.NullIO)
	r.say("exec", err)
	must(task.Resume(r.ctx))
	r.say("resume", task.Resume(r.ctx))
	pids, err := task.Pids(r.ctx)
	must(err)
	listed := false
	for _, each := range pids {
		listed = listed || each.Pid == task.Pid() && each.Info == nil
	}
	r.say("pids", nil, listed)
	metric, err := task.Metrics(r.ctx)
	must(err)
	r.say("metrics", nil, metric.ID, metric.Data.TypeUrl)
	loaded, err := container.Task(r.ctx, nil)
	must(err)
	r.say("loaded", nil, loaded.Pid() == task.Pid())
	must(feed.Close())
	must(task.CloseIO(r.ctx, containerd.WithStdinCloser))
	r.ended("exit", exited)
	status, err = task.Status(r.ctx)
	r.say("stopped", err, status.Status, status.ExitStatus, !status.ExitTime.IsZero())
	r.say("kill", task.Kill(r.ctx, syscall.SIGTERM))
	pids, err = task.Pids(r.ctx)
	r.say("pids", err, len(pids))
	deleted, err := task.Delete(r.ctx)
	must(err)
	r.told(1, 1)
	r.say("deleted", deleted.Error(), deleted.ExitCode(), deleted.ExitTime().Equal(status.ExitTime))
	r.say("output", nil, fmt.Sprintf("%q %q", out.String(), errs.String()))
	_, err = container.Task(r.ctx, nil)
	r.say("task", err)
	must(container.Delete(r.ctx))
}

// told waits until that many exits and deletions were told: shims tell them late, and what comes after is told by containerd.
func (r *run) told(exits, deletions int) {
	version, err := r.client.Version(r.ctx)
	must(err)
	if !strings.HasPrefix(strings.TrimPrefix(version.Version, "v"), "1.") {
		deletions = 0 // of later ones they get lost now and then
	}
	come := func() bool {
		r.mutex.Lock()
		defer r.mutex.Unlock()
		counts := map[string]int{}
		for _, topic := range r.topics {
			counts[topic]++
		}
		return counts["/tasks/exit"] >= exits && counts["/tasks/delete"] >= deletions
	}
	for end := time.Now().Add(patience); !come(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			must(errors.New("the events of a task's end did not come"))
		}
	}
}

func (r *run) ended(what string, exited <-chan containerd.ExitStatus) {
	select {
	case status := <-exited:
		code, _, err := status.Result()
		r.say(what, err, code)
	case <-time.After(patience):
		must(errors.New(what + " did not come"))
	}
}

func process(args ...string) *specs.Process {
	return &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}
}

func (r *run) execs() {
	container, err := r.make("x", "sleep", "1000")
	must(err)
	task, err := container.NewTask(r.ctx, cio.NullIO)
	must(err)
	init, err := task.Wait(r.ctx)
	must(err)
	must(task.Start(r.ctx))

	var out, errs output
	exec, err := task.Exec(r.ctx, "e", process("sh", "-c", "echo one; echo two >&2; exit 3"), r.creator(nil, &out, &errs))
	must(err)
	status, err := exec.Status(r.ctx)
	r.say("exec", err, status.Status, exec.Pid())
	_, err = task.Exec(r.ctx, "e", process("true"), cio.NullIO)
	r.say("exec twice", err)
	r.say("kill", exec.Kill(r.ctx, syscall.SIGKILL))
	exited, err := exec.Wait(r.ctx)
	must(err)
	must(exec.Start(r.ctx))
	// The client lets go of FIFOs that it is still opening when it deletes the exec.
	out.await("one\n")
	errs.await("two\n")
	r.ended("exec exit", exited)
	status, err = exec.Status(r.ctx)
	r.say("exec", err, status.Status, status.ExitStatus, exec.Pid() > 0)
	r.say("kill", exec.Kill(r.ctx, syscall.SIGKILL))
	r.say("resize", exec.Resize(r.ctx, 80, 24))
	deleted, err := exec.Delete(r.ctx)
	must(err)
	r.say("deleted", deleted.Error(), deleted.ExitCode())
	r.say("output", nil, fmt.Sprintf("%q %q", out.String(), errs.String()))
	_, err = exec.Status(r.ctx)
	r.say("exec", err)

	var screen output
	terminal := process("sh", "-c", "stty -echo; echo ready; read x; stty size; exit 4")
	terminal.Terminal = true
	input, feed := io.Pipe()
	exec, err = task.Exec(r.ctx, "tty", terminal, r.creator(input, &screen, nil, cio.WithTerminal))
	must(err)
	exited, err = exec.Wait(r.ctx)
	must(err)
	must(exec.Start(r.ctx))
	screen.await("ready")
	must(exec.Resize(r.ctx, 120, 40))
	_, err = feed.Write([]byte("\n"))
	must(err)
	r.ended("terminal exit", exited)
	must(feed.Close())
	_, err = exec.Delete(r.ctx)
	must(err)
	r.say("screen", nil, fmt.Sprintf("%q", screen.String()))

	exec, err = task.Exec(r.ctx, "missing", process("no-such-program"), cio.NullIO)
	must(err)
	r.say("missing", exec.Start(r.ctx))
	_, err = exec.Delete(r.ctx)
	r.say("missing", err)
	_, err = task.Exec(r.ctx, "a b", process("true"), cio.NullIO)
	r.say("exec name", err)

	exec, err = task.Exec(r.ctx, "left", process("sleep", "1000"), cio.NullIO)
	must(err)
	exited, err = exec.Wait(r.ctx)
	must(err)
	must(exec.Start(r.ctx))
	pids, err := task.Pids(r.ctx)
	must(err)
	for _, each := range pids {
		if each.Pid == exec.Pid() {
			r.say("pids", nil, len(pids), each.Info.TypeUrl)
		}
	}
	must(task.Kill(r.ctx, syscall.SIGKILL))
	r.ended("exec ends with init", exited)
	r.ended("init", init)
	_, err = exec.Delete(r.ctx)
	must(err)
	_, err = task.Exec(r.ctx, "late", process("true"), cio.NullIO)
	r.say("late", err)
	deleted, err = task.Delete(r.ctx)
	must(err)
	r.told(5, 2)
	r.say("deleted", deleted.Error(), deleted.ExitCode())
	r.say("task", task.Kill(r.ctx, syscall.SIGKILL))
	must(container.Delete(r.ctx))
}

func (r *run) refusals() {
	container, err := r.make("r", "no-such-program")
	must(err)
	_, err = container.NewTask(r.ctx, cio.NullIO)
	r.say("missing", err)
	must(container.Delete(r.ctx))
	container, err = r.client.NewContainer(
		r.ctx, "r", containerd.WithNewSpec(oci.WithRootFSPath(r.rootfs)), containerd.WithRuntime("io.containerd.bogus.v1", nil),
	)
	must(err)
	_, err = container.NewTask(r.ctx, cio.NullIO)
	r.say("runtime", err)
	must(container.Delete(r.ctx))
	nowhere := namespaces.WithNamespace(r.ctx, "a/b")
	_, err = r.client.Containers(nowhere)
	r.say("namespace", err)
	_, err = r.client.ContainerService().List(context.Background())
	r.say("no namespace", err)
}

func (r *run) content() {
	store := r.client.ContentStore()
	data := []byte("content of " + r.namespace)
	name := digest.FromBytes(data)
	hide := func(text string) string { return strings.ReplaceAll(text, name.String(), "DIGEST") }
	hidden := func(err error) error {
		if err == nil {
			return nil
		}
		return fmt.Errorf("%s (%s)", hide(err.Error()), kind(err))
	}
	descriptor := ocispec.Descriptor{MediaType: "text/plain", Digest: name, Size: int64(len(data))}
	_, err := store.Info(r.ctx, name)
	r.say("content info", hidden(err))
	must(content.WriteBlob(r.ctx, store, "ref", bytes.NewReader(data), descriptor, content.WithLabels(map[string]string{"a": "b", root: "kept"})))
	r.say("write again", content.WriteBlob(r.ctx, store, "ref", bytes.NewReader(data), descriptor))
	info, err := store.Info(r.ctx, name)
	r.say("content info", hidden(err), info.Digest == name, info.Size == int64(len(data)), names(info.Labels))
	read, err := content.ReadBlob(r.ctx, store, descriptor)
	r.say("read", err, bytes.Equal(read, data))
	reader, err := store.ReaderAt(r.ctx, descriptor)
	must(err)
	part := make([]byte, 4)
	count, err := reader.ReadAt(part, 3)
	r.say("read at", err, count, string(part))
	count, err = reader.ReadAt(part, reader.Size()-2)
	r.say("read at", err, count)
	must(reader.Close())
	info, err = store.Update(r.ctx, content.Info{Digest: name, Labels: map[string]string{"c": "d"}}, "labels.c")
	r.say("update", hidden(err), names(info.Labels))
	found := 0
	must(store.Walk(r.ctx, func(content.Info) error { found++; return nil }))
	r.say("walk", nil, found)
	must(store.Walk(r.ctx, func(content.Info) error { found++; return nil }, "labels.none==x"))
	r.say("walk", nil, found)

	writer, err := store.Writer(r.ctx, content.WithRef("open"), content.WithDescriptor(ocispec.Descriptor{Size: 5}))
	must(err)
	_, err = writer.Write([]byte("abc"))
	must(err)
	_, err = store.Writer(r.ctx, content.WithRef("open"))
	r.say("locked", nil, kind(err))
	status, err := store.Status(r.ctx, "open")
	r.say("status", err, status.Ref, status.Offset, status.Total)
	statuses, err := store.ListStatuses(r.ctx)
	r.say("statuses", err, len(statuses))
	r.say("commit", writer.Commit(r.ctx, 5, ""))
	must(writer.Close())
	r.say("abort", store.Abort(r.ctx, "open"))
	r.say("abort", store.Abort(r.ctx, "open"))
	r.say("delete", hidden(store.Delete(r.ctx, name)))
	r.say("delete", hidden(store.Delete(r.ctx, name)))
	_, err = store.ReaderAt(r.ctx, descriptor)
	r.say("read", hidden(err))
}

func (r *run) images() {
	store := r.client.ImageService()
	target := ocispec.Descriptor{
		MediaType: images.MediaTypeDockerSchema2Manifest, Digest: digest.FromString("x"), Size: 1,
	}
	image, err := store.Create(r.ctx, images.Image{Name: "image", Labels: map[string]string{"a": "b"}, Target: target})
	r.say("image", err, image.Name, names(image.Labels), image.Target.Digest == target.Digest)
	_, err = store.Create(r.ctx, images.Image{Name: "image", Target: target})
	r.say("image twice", err)
	_, err = store.Create(r.ctx, images.Image{Name: "bad"})
	r.say("bad image", err)
	image, err = store.Update(r.ctx, images.Image{Name: "image", Labels: map[string]string{"c": "d"}, Target: target}, "labels")
	r.say("update", err, names(image.Labels))
	listed, err := store.List(r.ctx, "name==image")
	r.say("list", err, len(listed))
	r.say("delete", store.Delete(r.ctx, "image"))
	r.say("delete", store.Delete(r.ctx, "image"))
	_, err = store.Get(r.ctx, "image")
	r.say("get", err)
}

func (r *run) leases() {
	manager := r.client.LeasesService()
	lease, err := manager.Create(r.ctx, leases.WithID("l"), leases.WithLabels(map[string]string{"a": "b"}))
	r.say("lease", err, lease.ID, names(lease.Labels), !lease.CreatedAt.IsZero())
	_, err = manager.Create(r.ctx, leases.WithID("l"))
	r.say("lease twice", err)
	random, err := manager.Create(r.ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	r.say("random", err, random.ID != "", len(random.Labels))
	must(manager.Delete(r.ctx, random))
	must(manager.AddResource(r.ctx, lease, leases.Resource{ID: "k", Type: "snapshots/" + snapshotter}))
	r.say("resource", manager.AddResource(r.ctx, lease, leases.Resource{ID: "k", Type: "nothing"}))
	resources, err := manager.ListResources(r.ctx, lease)
	r.say("resources", err, resources)
	must(manager.DeleteResource(r.ctx, lease, leases.Resource{ID: "k", Type: "snapshots/" + snapshotter}))
	listed, err := manager.List(r.ctx, `labels."a"==b`)
	r.say("list", err, len(listed))
	r.say("delete", manager.Delete(r.ctx, lease))
	r.say("delete", manager.Delete(r.ctx, lease))
	_, err = manager.ListResources(r.ctx, lease)
	r.say("resources", err)
}

func (r *run) snapshots() {
	service := r.client.SnapshotService(snapshotter)
	mounts, err := service.Prepare(r.ctx, "active", "", snapshots.WithLabels(map[string]string{"a": "b", root: "kept"}))
	must(err)
	must(os.WriteFile(mounts[0].Source+"/file", []byte("x"), 0o600))
	r.say("prepare", nil, len(mounts), mounts[0].Type, mounts[0].Options)
	_, err = service.Prepare(r.ctx, "active", "")
	r.say("twice", err)
	_, err = service.Prepare(r.ctx, "child", "nothing")
	r.say("parent", err)
	must(service.Commit(r.ctx, "layer", "active", snapshots.WithLabels(map[string]string{root: "kept"})))
	r.say("commit", service.Commit(r.ctx, "layer2", "active"))
	info, err := service.Stat(r.ctx, "layer")
	r.say("stat", err, info.Name, info.Parent, info.Kind, names(info.Labels))
	mounts, err = service.View(r.ctx, "view", "layer", snapshots.WithLabels(map[string]string{root: "kept"}))
	must(err)
	data, err := os.ReadFile(mounts[0].Source + "/file")
	r.say("view", err, string(data), mounts[0].Options)
	again, err := service.Mounts(r.ctx, "view")
	r.say("mounts", err, again[0].Source == mounts[0].Source)
	r.say("remove", service.Remove(r.ctx, "layer"))
	found := []string{}
	must(service.Walk(r.ctx, func(_ context.Context, info snapshots.Info) error {
		found = append(found, fmt.Sprintf("%s:%s:%s", info.Name, info.Parent, info.Kind))
		return nil
	}))
	sort.Strings(found)
	r.say("walk", nil, found)
	must(service.Remove(r.ctx, "view"))
	must(service.Remove(r.ctx, "layer"))
	r.say("remove", service.Remove(r.ctx, "layer"))
	_, err = r.client.SnapshotService("no-such").Stat(r.ctx, "layer")
	r.say("snapshotter", err)
}

func (r *run) namespaces() {
	service := r.client.NamespaceService()
	name := r.namespace + "-2"
	r.say("namespace", service.Create(r.ctx, name, map[string]string{"a": "b"}))
	r.say("namespace", service.Create(r.ctx, name, nil))
	must(service.SetLabel(r.ctx, name, "c", "d"))
	labels, err := service.Labels(r.ctx, name)
	r.say("labels", err, names(labels))
	listed, err := service.List(r.ctx)
	must(err)
	count := 0
	for _, each := range listed {
		if strings.HasPrefix(each, r.namespace) {
			count++
		}
	}
	r.say("list", nil, count)
	inside := namespaces.WithNamespace(r.ctx, name)
	container, err := r.client.NewContainer(inside, "c", containerd.WithNewSpec())
	must(err)
	r.say("not empty", service.Delete(r.ctx, name))
	must(container.Delete(inside))
	r.say("delete", service.Delete(r.ctx, name))
	r.say("delete", service.Delete(r.ctx, name))
}

// events prints the topics of all that this program did, in order: the last thing of its own is a container's end.
func (r *run) events() {
	container, err := r.client.NewContainer(r.ctx, "last", containerd.WithNewSpec())
	must(err)
	must(container.Delete(r.ctx))
	last := func() bool {
		r.mutex.Lock()
		defer r.mutex.Unlock()
		count := len(r.topics)
		return count >= 2 && r.topics[count-1] == "/containers/delete" && r.topics[count-2] == "/containers/create"
	}
	for end := time.Now().Add(patience); !last(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			must(errors.New("the last events did not come"))
		}
	}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	probing := true
	for _, topic := range r.topics {
		// How often the subscription was probed is chance, and whether it saw its container made.
		if !probing {
			fmt.Println("event", topic)
		}
		probing = probing && topic != "/containers/delete"
	}
}

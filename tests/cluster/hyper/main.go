// Command hyper is every Kubernetes program the demo and the tests need, in one binary: the packages they
// share are compiled and linked once. The program is chosen by the name it is called by (a symlink), else by
// the first argument.
package main

import (
	"context"
	"flag"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // CronJob time zones, also where the machine has no zone files

	"github.com/coredns/coredns/coremain"
	// What a cluster's own names need, of CoreDNS's fifty plugins.
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
	kwokconfig "sigs.k8s.io/kwok/pkg/config"
	kwok "sigs.k8s.io/kwok/pkg/kwok/cmd"
	kwoklog "sigs.k8s.io/kwok/pkg/log"
	kwoksignals "sigs.k8s.io/kwok/pkg/utils/signals"
)

const (
	// The process that this one must not outlive.
	parentPIDVariable = "HYPER_PARENT_PID"
	// With both set, kube-apiserver serves its own etcd.
	etcdDirVariable = "EMBED_ETCD_DIR"
	etcdURLVariable = "EMBED_ETCD_URL"
)

// Flags that CoreDNS registers for the whole process, of which others take all that there are.
var coreDNSFlags = []string{"conf", "dns.port", "p", "pidfile", "plugins", "quiet", "version"}

// Each program ends by returning its exit status.
var programs = map[string]func() int{
	"coredns":                 runCoreDNS,
	"etcd":                    func() int { etcdmain.Main(os.Args); return 0 },
	"kube-apiserver":          runAPIServer,
	"kube-controller-manager": command(controllermanager.NewControllerManagerCommand),
	"kube-proxy":              command(proxy.NewProxyCommand),
	"kube-scheduler":          command(func() *cobra.Command { return scheduler.NewSchedulerCommand() }),
	"kubectl":                 runKubectl,
	"kubelet":                 command(func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) }),
	"kwok":                    runKwok,
}

func main() {
	if err := endWithParent(); err != nil {
		fail(err)
	}
	run, known := programs[filepath.Base(os.Args[0])]
	if !known && len(os.Args) > 1 {
		// The programs read os.Args themselves, so it must look as if each had been called by its own name.
		os.Args = os.Args[1:]
		run, known = programs[os.Args[0]]
	}
	if !known {
		names := make([]string, 0, len(programs))
		for name := range programs {
			names = append(names, name)
		}
		slices.Sort(names)
		fmt.Fprintf(os.Stderr, "usage: hyper PROGRAM [ARGUMENTS]\nprograms: %s\n", strings.Join(names, ", "))
		os.Exit(2)
	}
	if filepath.Base(os.Args[0]) != "coredns" {
		hideCoreDNSFlags()
	}
	os.Exit(run())
}

func runCoreDNS() int {
	coremain.Run()
	return 0
}

// hideCoreDNSFlags keeps what is CoreDNS's alone from programs that have a flag of that name with another meaning:
// kube-proxy would start where it is asked for its version.
func hideCoreDNSFlags() {
	others := flag.NewFlagSet(os.Args[0], flag.ExitOnError)
	flag.VisitAll(func(each *flag.Flag) {
		if !slices.Contains(coreDNSFlags, each.Name) {
			others.Var(each.Value, each.Name, each.Usage)
		}
	})
	flag.CommandLine = others
}

func command(create func() *cobra.Command) func() int {
	return func() int { return cli.Run(create()) }
}

func runKubectl() int {
	// kubectl prints errors in a form of its own; cli.Run would print them as cobra does.
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		kubectlutil.CheckErr(err)
	}
	return 0
}

// runKwok gives kwok the flags that it shares with other commands of its own project, --config among them.
func runKwok() int {
	shared := pflag.NewFlagSet("shared", pflag.ContinueOnError)
	shared.ParseErrorsAllowlist.UnknownFlags = true
	shared.Usage = func() {}
	ctx, _ := kwoklog.InitFlags(kwoksignals.SetupSignalContext(), shared)
	ctx, err := kwokconfig.InitFlags(ctx, shared)
	if err != nil {
		fail(fmt.Errorf("kwok: %w", err))
	}
	command := kwok.NewCommand(ctx)
	// Else it would be given Kubernetes' flag of that name, which is no switch, and refuse to run.
	command.Flags().Bool("version", false, "print the version")
	command.PersistentFlags().AddFlagSet(shared)
	if command.ExecuteContext(ctx) != nil {
		return 1 // cobra has said why
	}
	return 0
}

func runAPIServer() int {
	if dir := os.Getenv(etcdDirVariable); dir != "" {
		if err := startEtcd(dir, os.Getenv(etcdURLVariable)); err != nil {
			fail(fmt.Errorf("embedded etcd: %w", err))
		}
	}
	return cli.Run(apiserver.NewAPIServerCommand())
}

// startEtcd serves a one-member etcd in this process and returns when it is ready. The process ends if etcd
// does: an API server without its store can only answer with errors. etcd is never closed: what it has answered
// is in its log, from which it starts again however the process ended.
func startEtcd(dir, clientURL string) error {
	client, err := url.Parse(clientURL)
	if err != nil || client.Scheme == "" {
		return fmt.Errorf("%s must be a URL, not %q", etcdURLVariable, clientURL)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	config := embed.NewConfig()
	config.Dir = dir
	config.LogLevel = "error"
	// Data outlives the process, not a power failure: what is here is never worth a disk write's wait.
	config.UnsafeNoFsync = true
	// A lone member has nobody to hear from; waiting a second for an election would only slow the start.
	config.TickMs, config.ElectionMs = 20, 200
	config.ListenClientUrls = []url.URL{*client}
	// No peer will ever call, and etcd can't do without a place where one could: one that only the directory's
	// owner reaches.
	config.ListenPeerUrls = []url.URL{{Scheme: "unix", Host: filepath.Join(dir, "peer.sock")}}

	etcd, err := embed.StartEtcd(config)
	if err != nil {
		return err
	}
	select {
	case <-etcd.Server.ReadyNotify():
	case err := <-etcd.Err():
		return err
	case <-time.After(30 * time.Second):
		return fmt.Errorf("not ready after 30 s")
	}
	go func() {
		if err := <-etcd.Err(); err != nil {
			fail(fmt.Errorf("embedded etcd: %w", err))
		}
	}()
	return nil
}

// endWithParent makes this process end soon after its parent, also if the parent was killed by SIGKILL.
//
// It compares parents rather than asking for PR_SET_PDEATHSIG, which fires when the thread that started this
// process ends, not when the whole parent does, and does nothing if the parent died before the call.
func endWithParent() error {
	value, set := os.LookupEnv(parentPIDVariable)
	if !set {
		return nil
	}
	parent, err := strconv.Atoi(value)
	if err != nil {
		return fmt.Errorf("%s must be a process id, not %q", parentPIDVariable, value)
	}
	// What this process starts has another parent.
	if err := os.Unsetenv(parentPIDVariable); err != nil {
		return err
	}
	go func() {
		for os.Getppid() == parent {
			time.Sleep(200 * time.Millisecond)
		}
		fail(fmt.Errorf("parent process %d is gone", parent))
	}()
	return nil
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "hyper:", err)
	os.Exit(1)
}

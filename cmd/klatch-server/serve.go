// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/obs"
	"klatch/internal/pki"
	"klatch/internal/server/api"
	"klatch/internal/server/enroll"
	"klatch/internal/server/ingest"
	"klatch/internal/server/repo"
	"klatch/internal/server/store/sqlstore"
	"klatch/internal/server/web"
)

const serveHelp = `serve runs the server: machines over TLS on --listen, the page and the admin
API on --admin-listen. When both listen, it prints one line:

  ready fleet=https://0.0.0.0:8443 admin=http://127.0.0.1:8480

The admin listener speaks plain HTTP on a loopback address only; elsewhere it
needs --admin-tls. The password is the admin token, with any user name.`

// Deadlines. A livepatch of 64 MiB at a slow 64 KiB a second takes 17 minutes.
const (
	readTimeout  = time.Minute
	writeTimeout = 20 * time.Minute
	idleTimeout  = 2 * time.Minute
	shutdownTime = 10 * time.Second

	// lookInterval is how often a sync by another process is looked for.
	lookInterval = 2 * time.Second
)

type serveOptions struct {
	listen, admin, upstream string
	adminTLS                bool
	interval                time.Duration
	verbose                 bool
}

func serveCommand(dir *string) *cobra.Command {
	var o serveOptions
	c := &cobra.Command{
		Use:   "serve",
		Short: "run the server",
		Long:  serveHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cli.Cannot(serve(cmd, *dir, o), "serve")
		},
	}
	f := c.Flags()
	f.StringVar(&o.listen, "listen", "0.0.0.0:8443", "address for machines")
	f.StringVar(&o.admin, "admin-listen", "127.0.0.1:8480", "address of the page and the admin API")
	f.BoolVar(&o.adminTLS, "admin-tls", false, "speak TLS on the admin address, with the server's certificate")
	f.StringVar(&o.upstream, "sync-from", "", "copy the repository from here, again and again; default: as init was told")
	f.DurationVar(&o.interval, "sync-interval", 0, "time between two copies; default: as configured, 5 minutes at first")
	f.BoolVar(&o.verbose, "verbose", false, "log every request")
	return c
}

func serve(cmd *cobra.Command, dir string, o serveOptions) error {
	ctx := cmd.Context()
	level := slog.LevelInfo
	if o.verbose {
		level = slog.LevelDebug
	}
	log := obs.NewJSON(cmd.ErrOrStderr(), level)
	if err := checkAdminAddress(o); err != nil {
		return err
	}
	d, err := openData(dir)
	if err != nil {
		return err
	}
	db, err := sqlstore.Open(ctx, d.path(databaseFile))
	if err != nil {
		return err
	}
	defer db.Close() //nolint:errcheck // every write was committed
	files, err := newMovable(ctx, d)
	if err != nil {
		return err
	}
	copied := repo.New(files, d.path(memoryDir), d.anchor, log)
	if err := copied.Load(ctx, time.Now()); err != nil {
		// Machines can still enroll and report; the next sync mends the copy.
		log.LogAttrs(ctx, slog.LevelError, "repository cannot be read", obs.Err(err))
	}

	operator, err := openRollout(ctx, d, copied, log)
	if err != nil {
		return err
	}
	var closed atomic.Bool
	closed.Store(d.Closed)
	a := &api.API{
		Rollout: operator, CA: d.ca, Store: db, Repo: copied, AdminDigest: d.AdminDigest, Now: time.Now, Log: log,
		Enroller: &enroll.Enroller{CA: d.ca, Tokens: db, Mirrors: db, Now: time.Now},
		Closed:   closed.Load,
		Ingester: &ingest.Ingester{Machines: db, Reports: db, Now: time.Now, Log: log,
			Published: func(tier string) []fleet.Published { return offered(operator, tier, copied.Catalog().Published()) },
			Absent:    func() []fleet.Absent { return copied.Catalog().Absent() }},
		Pages: &web.Pages{Machines: db, Catalog: copied.Catalog, Now: time.Now, Version: version},
	}
	cert := &certificate{d: d, log: log}
	if _, err := cert.get(nil); err != nil {
		return err
	}
	tlsConfig := pki.ServerTLS(tls.Certificate{})
	tlsConfig.Certificates, tlsConfig.GetCertificate = nil, cert.get

	var lc net.ListenConfig
	fleetListener, err := lc.Listen(ctx, "tcp", o.listen)
	if err != nil {
		return err
	}
	adminListener, err := lc.Listen(ctx, "tcp", o.admin)
	if err != nil {
		return errors.Join(err, fleetListener.Close())
	}
	adminScheme := "http"
	if o.adminTLS {
		adminScheme = "https"
		adminListener = tls.NewListener(adminListener, withALPN(tlsConfig))
	}
	fleetServer := newServer(a.Fleet(), log)
	adminServer := newServer(a.Admin(), log)
	failed := make(chan error, 2)
	go func() { failed <- fleetServer.Serve(tls.NewListener(fleetListener, withALPN(tlsConfig))) }()
	go func() { failed <- adminServer.Serve(adminListener) }()

	loop, stopLoop := context.WithCancel(ctx)
	defer stopLoop()
	trigger := make(chan os.Signal, 1)
	signal.Notify(trigger, syscall.SIGHUP)
	defer signal.Stop(trigger)
	go follow(loop, d, copied, o, trigger, func(s settings) { closed.Store(s.Closed); files.follow(loop, s.Storage, log) }, log)
	if operator != nil {
		go followRollout(loop, operator, copied, log)
	}

	log.Info("serving", slog.String("fleet", fleetListener.Addr().String()), slog.String("admin", adminListener.Addr().String()),
		slog.String("publisher", d.anchor.Publisher), slog.Int("livepatches", len(copied.Catalog().Entries)), slog.String("version", version))
	if _, err := fmt.Fprintf(cmd.OutOrStdout(), "ready fleet=https://%s admin=%s://%s\n", fleetListener.Addr(), adminScheme, adminListener.Addr()); err != nil {
		return err
	}
	notifyReady(ctx, log)

	select {
	case err = <-failed:
	case <-ctx.Done():
		log.Info("stopping")
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
	defer cancel()
	return errors.Join(err, fleetServer.Shutdown(end), adminServer.Shutdown(end))
}

func withALPN(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.NextProtos = []string{"http/1.1"}
	return c
}

func newServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// checkAdminAddress keeps the password off the network.
func checkAdminAddress(o serveOptions) error {
	host, _, err := net.SplitHostPort(o.admin)
	if err != nil {
		return fault.New(fault.Invalid, "bad_address", "admin address %q: %w", o.admin, err)
	}
	if ip := net.ParseIP(host); host == "localhost" || (ip != nil && ip.IsLoopback()) || o.adminTLS {
		return nil
	}
	return fault.New(fault.Invalid, "admin_needs_tls", "admin address %s is not a loopback address, and plain HTTP would show the admin token", o.admin).
		WithHint("add --admin-tls, or listen on 127.0.0.1 and reach it through a tunnel: ssh -L 8480:127.0.0.1:8480 SERVER")
}

// follow keeps the catalog on what is published: it copies from upstream, at
// its interval or at once on SIGHUP, and it notices when another process has
// copied. Settings are read again each time.
func follow(ctx context.Context, d *data, r *repo.Repo, o serveOptions, trigger <-chan os.Signal, obey func(settings), log *slog.Logger) {
	look := time.NewTicker(lookInterval)
	defer look.Stop()
	var last, retry time.Time
	wait := time.Duration(0)
	for {
		s := d.settingsNow()
		obey(s)
		from, interval := cmp.Or(o.upstream, s.Upstream), cmp.Or(o.interval, s.interval())
		if now := time.Now(); from != "" && now.Sub(last) >= min(wait, withJitter(interval, 1)) {
			last, wait = now, withJitter(interval, rand.Float64()) //nolint:gosec // spreads load, keeps no secret
			res, err := syncFrom(ctx, d, r, from, nil)
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				log.LogAttrs(ctx, slog.LevelWarn, "sync did not work", slog.String("from", from), obs.Err(err))
			case res.Changed:
				log.LogAttrs(ctx, slog.LevelInfo, "repository synced", slog.Int("livepatches", res.Livepatches), slog.Int("copied", res.Copied),
					slog.Int("left_out", len(res.LeftOut)), slog.Int64("recalls", res.Recalls), slog.Int64("metadata", res.Version))
			}
		}
		if r.Changed(ctx) && time.Now().After(retry) {
			if err := r.Load(ctx, time.Now()); err != nil && ctx.Err() == nil {
				retry = time.Now().Add(time.Minute)
				log.LogAttrs(ctx, slog.LevelWarn, "repository cannot be read", obs.Err(err))
			} else {
				log.LogAttrs(ctx, slog.LevelInfo, "repository read again", slog.Int("livepatches", len(r.Catalog().Entries)))
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-trigger:
			wait = 0
			log.LogAttrs(ctx, slog.LevelInfo, "sync asked for by signal")
		case <-look.C:
		}
	}
}

// withJitter is an interval and up to a tenth less: mirrors that were started
// together shall not come together.
func withJitter(interval time.Duration, part float64) time.Duration {
	return interval - time.Duration(float64(interval)/10*(1-part))
}

// settingsNow reads the settings again; those of the start count while they
// cannot be read, and the next sync says why.
func (d *data) settingsNow() settings {
	s, err := readSettings(d.dir)
	if err != nil {
		return d.settings
	}
	return s
}

// notifyReady tells systemd (sd_notify(3)), if it asked.
func notifyReady(ctx context.Context, log *slog.Logger) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixgram", path)
	if err == nil {
		_, err = c.Write([]byte("READY=1"))
		err = errors.Join(err, c.Close())
	}
	if err != nil {
		log.LogAttrs(ctx, slog.LevelWarn, "service manager was not told", obs.Err(err))
	}
}

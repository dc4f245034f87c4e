// SPDX-License-Identifier: Apache-2.0

package ceremony

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"time"

	"klatch/internal/tufrepo"
)

// Level says how near an expiry is.
type Level string

// The levels. Due is the ordinary time to sign again; from Warning on somebody
// has missed that.
const (
	Good    Level = "good"
	Due     Level = "due"
	Warning Level = "warning"
	Urgent  Level = "urgent"
	Expired Level = "expired"
)

// Entry is one thing that ends some day.
type Entry struct {
	What    string    `json:"what"`
	Expires time.Time `json:"expires"`
	Due     time.Time `json:"due"`  // from here on it should be signed again
	Warn    time.Time `json:"warn"` // from here on it is late
	Level   Level     `json:"level"`
	ToDo    string    `json:"todo"`
}

// Calendar lists what expires, the soonest first. A quarter of a life before
// the end is a warning (a root: 91 days), a twelfth is urgent (30 days).
func Calendar(s tufrepo.State, now time.Time) []Entry {
	var out []Entry
	for _, r := range s.Roles {
		if r.Version == 0 {
			continue
		}
		e := Entry{What: r.Name, Expires: r.Expires, Due: r.Expires.Add(-r.Life / 2), Warn: r.Expires.Add(-r.Life / 4)}
		switch r.Name {
		case "snapshot", "timestamp":
			e.ToDo = "klatch-forge publish --refresh"
		case "root":
			// Three months before its end: time for several people to meet.
			e.Due, e.ToDo = r.Expires.Add(-r.Life/4), "klatch-forge keys renew root"
			e.Warn = r.Expires.Add(-r.Life / 6)
		default:
			e.ToDo = "klatch-forge keys renew " + r.Name
		}
		e.Level = level(now, e, r.Life)
		out = append(out, e)
	}
	slices.SortStableFunc(out, func(a, b Entry) int { return a.Expires.Compare(b.Expires) })
	return out
}

func level(now time.Time, e Entry, life time.Duration) Level {
	switch left := e.Expires.Sub(now); {
	case left <= 0:
		return Expired
	case left < life/12:
		return Urgent
	case !now.Before(e.Warn):
		return Warning
	case !now.Before(e.Due):
		return Due
	}
	return Good
}

// ICalendar writes the calendar as RFC 5545 has it: for each entry the day
// from which it is due, and the day it ends. Snapshot and timestamp, which a
// service renews, are left out.
func ICalendar(publisher string, entries []Entry, now time.Time) []byte {
	var b strings.Builder
	line := func(s string) { // no content line over 75 octets (section 3.1)
		for len(s) > 74 {
			b.WriteString(s[:74] + "\r\n")
			s = " " + s[74:]
		}
		b.WriteString(s + "\r\n")
	}
	line("BEGIN:VCALENDAR")
	line("VERSION:2.0")
	line("PRODID:-//klatch//klatch-forge keys//EN")
	for _, e := range entries {
		if e.What == "snapshot" || e.What == "timestamp" {
			continue
		}
		for _, ev := range []struct {
			at   time.Time
			text string
		}{{e.Due, "sign " + e.What + " again"}, {e.Expires, e.What + " EXPIRES"}} {
			sum := sha256.Sum256([]byte(publisher + ev.text + ev.at.String()))
			line("BEGIN:VEVENT")
			line(fmt.Sprintf("UID:%x@klatch", sum[:16]))
			line("DTSTAMP:" + now.UTC().Format("20060102T150405Z"))
			line("DTSTART;VALUE=DATE:" + ev.at.UTC().Format("20060102"))
			line("SUMMARY:" + publisher + ": " + ev.text)
			line("DESCRIPTION:" + e.ToDo)
			line("END:VEVENT")
		}
	}
	line("END:VCALENDAR")
	return []byte(b.String())
}

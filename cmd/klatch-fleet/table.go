// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"unicode"
)

// table prints lists for people. What is in a cell came from the server, which
// has much of it from machines: it stays in its cell, and no terminal obeys it.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer, head ...any) table {
	t := table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	t.row(head...)
	return t
}

func (t table) row(cells ...any) {
	var words []string
	for _, c := range cells {
		words = append(words, strings.Map(func(r rune) rune {
			if unicode.IsPrint(r) {
				return r
			}
			return '?'
		}, fmt.Sprint(c)))
	}
	fmt.Fprintln(t.w, strings.Join(words, "\t")) //nolint:errcheck // Flush tells
}

// end writes it all.
func (t table) end() error { return t.w.Flush() }

// quoted keeps a text of several words apart from the words of the table.
func quoted[S ~string](s S) string { return fmt.Sprintf("%q", string(s)) }

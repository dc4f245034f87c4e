// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/forge/sandbox"
)

// buildLimits are the flags that bound a build.
type buildLimits struct {
	memory, disk size
	timeout      time.Duration
}

func (l *buildLimits) flags(c *cobra.Command) {
	c.Flags().Var(&l.memory, "memory", "memory of the whole build, such as 6G; 0: 4G and 1G for each CPU")
	c.Flags().Var(&l.disk, "disk", "what the build may write, such as 20G; 0: 16G")
	c.Flags().DurationVar(&l.timeout, "timeout", 0, "time of the build, such as 30m; 0: two hours")
}

// sandbox checks the flags.
func (l *buildLimits) sandbox() (sandbox.Limits, error) {
	out := sandbox.Limits{Memory: int64(l.memory), Disk: int64(l.disk)}
	if l.timeout < 0 {
		return out, invalid("a time limit of %s", l.timeout)("give a positive one, such as --timeout 30m")
	}
	return out, out.Check()
}

// size is a number of bytes as a person writes it: 300M, 6G.
type size int64

var sizeUnits = []struct {
	suffix string
	bytes  int64
}{{"T", 1 << 40}, {"G", 1 << 30}, {"M", 1 << 20}, {"K", 1 << 10}, {"", 1}}

// Set implements pflag.Value.
func (s *size) Set(text string) error {
	for _, u := range sizeUnits {
		digits, ok := strings.CutSuffix(strings.TrimSuffix(strings.ToUpper(text), "IB"), u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n < 0 || n > 1<<60/u.bytes {
			break
		}
		*s = size(n * u.bytes)
		return nil
	}
	return fmt.Errorf("%q is no size; write a whole number and K, M, G or T, such as 6G", text)
}

// String implements pflag.Value.
func (s *size) String() string {
	for _, u := range sizeUnits {
		if n := int64(*s); n > 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.suffix
		}
	}
	return "0"
}

// Type implements pflag.Value.
func (*size) Type() string { return "size" }

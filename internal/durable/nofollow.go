// SPDX-License-Identifier: Apache-2.0

package durable

import "golang.org/x/sys/unix"

// noFollow refuses a symbolic link at the last path element (open(2),
// O_NOFOLLOW) and does not hang on a FIFO (O_NONBLOCK).
const noFollow = unix.O_NOFOLLOW | unix.O_NONBLOCK

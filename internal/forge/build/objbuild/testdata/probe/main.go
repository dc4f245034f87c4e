// SPDX-License-Identifier: Apache-2.0

// Command probe does in a guest what a shell cannot: system calls whose answer
// tells whether old or new code ran. It prints the answer.
package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"
)

func main() {
	runtime.LockOSThread()
	probes := map[string]func() (any, error){
		"sysinfo": sysinfo, "itimer": itimer, "loop": loop, "tun": tun, "packet": packet,
	}
	p := probes[os.Args[1]]
	answer, err := p()
	if errno, ok := err.(syscall.Errno); ok { //nolint:errorlint // made here
		answer = fmt.Sprintf("errno %d", errno)
	} else if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(answer) //nolint:forbidigo // a program
}

func sysinfo() (any, error) {
	var i syscall.Sysinfo_t
	err := syscall.Sysinfo(&i)
	return i.Procs >= 30000, err
}

// itimer sets a timer of 4242 microseconds in an hour.
func itimer() (any, error) {
	v := [4]int64{0, 0, 3600, 4242} // struct itimerval
	_, _, e := syscall.Syscall(syscall.SYS_SETITIMER, 0, uintptr(unsafe.Pointer(&v)), 0)
	return "ok", orNil(e)
}

// loop asks the loop driver for something that it does not know.
func loop() (any, error) {
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	_, _, e := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), 0x4c7f, 0)
	return "ok", orNil(e)
}

// strange is no kind of segmentation (include/uapi/linux/virtio_net.h).
const strange = 0x55

const headerLen = 10 // struct virtio_net_hdr

func frame() []byte {
	b := make([]byte, headerLen+60)
	b[1] = strange
	copy(b[headerLen:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5})
	return b
}

type ifreq struct {
	name  [16]byte
	value [24]byte
}

// tun writes a frame with a strange header into a tap interface.
func tun() (any, error) {
	fd, err := syscall.Open("/dev/net/tun", syscall.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	var r ifreq
	copy(r.name[:], "klatch0")
	*(*uint16)(unsafe.Pointer(&r.value)) = syscall.IFF_TAP | syscall.IFF_NO_PI | syscall.IFF_VNET_HDR
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.TUNSETIFF, uintptr(unsafe.Pointer(&r))); e != 0 {
		return nil, fmt.Errorf("TUNSETIFF: %w", e)
	}
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return nil, err
	}
	*(*uint16)(unsafe.Pointer(&r.value)) = syscall.IFF_UP
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(s), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&r))); e != 0 {
		return nil, fmt.Errorf("up: %w", e)
	}
	return syscall.Write(fd, frame())
}

// packet sends a frame with a strange header to the loopback interface.
func packet() (any, error) {
	const (
		solPacket     = 263
		packetVnetHdr = 15
	)
	s, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0)
	if err != nil {
		return nil, err
	}
	if err := syscall.SetsockoptInt(s, solPacket, packetVnetHdr, 1); err != nil {
		return nil, fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	if err := syscall.Bind(s, &syscall.SockaddrLinklayer{Ifindex: 1, Protocol: 0x0300}); err != nil {
		return nil, fmt.Errorf("bind: %w", err)
	}
	return syscall.Write(s, frame())
}

func orNil(e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

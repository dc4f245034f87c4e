// SPDX-License-Identifier: Apache-2.0

package efi

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf16"
)

// Layout of EDK2's variable store in the flash (MdePkg/Include/Pi/
// PiFirmwareVolume.h, MdeModulePkg/Include/Guid/VariableFormat.h).
const (
	volumeHeader    = 48 // offset of its length in the volume's header
	storeHeaderLen  = 28
	variableLen     = 60
	variableStart   = 0x55aa
	variableAdded   = 0x3f
	variableAlign   = 4
	maxStore        = 4 << 20
	maxVariableName = 1024
)

var authenticated = MustGUID("aaf32c78-947b-439a-a180-2e144ec37792")

// Change gives a flash image with variables added, replaced, or, where one has
// no data, taken out. The image is one that EDK2 made, empty or not.
func Change(flash []byte, changes ...Variable) ([]byte, error) {
	begin, end, err := storeBounds(flash)
	if err != nil {
		return nil, err
	}
	have, err := variables(flash[begin:end])
	if err != nil {
		return nil, err
	}
	for _, c := range changes {
		kept := have[:0:0]
		for _, v := range have {
			if v.Name != c.Name || v.Vendor != c.Vendor {
				kept = append(kept, v)
			}
		}
		if have = kept; len(c.Data) > 0 {
			have = append(have, c)
		}
	}
	var b []byte
	for _, v := range have {
		b = append(b, v.encode()...)
	}
	if len(b) > end-begin {
		return nil, fmt.Errorf("variables of %d bytes in a store of %d", len(b), end-begin)
	}
	out := bytes.Clone(flash)
	copy(out[begin:], b)
	for i := begin + len(b); i < end; i++ {
		out[i] = 0xff // flash that was never written
	}
	return out, nil
}

// Variables are those that are in a flash image.
func Variables(flash []byte) ([]Variable, error) {
	begin, end, err := storeBounds(flash)
	if err != nil {
		return nil, err
	}
	return variables(flash[begin:end])
}

func storeBounds(flash []byte) (begin, end int, err error) {
	if len(flash) < volumeHeader+2 || len(flash) > maxStore || string(flash[40:44]) != "_FVH" {
		return 0, 0, errors.New("not a flash image with firmware variables")
	}
	at := int(binary.LittleEndian.Uint16(flash[volumeHeader:]))
	if at+storeHeaderLen > len(flash) || GUID(flash[at:at+16]) != authenticated {
		return 0, 0, errors.New("flash image has no store of authenticated variables")
	}
	size := int(binary.LittleEndian.Uint32(flash[at+16:]))
	if size < storeHeaderLen || at+size > len(flash) {
		return 0, 0, fmt.Errorf("store of %d bytes in a flash image of %d", size, len(flash))
	}
	return at + storeHeaderLen, at + size, nil
}

func variables(store []byte) ([]Variable, error) {
	var list []Variable
	for len(store) >= variableLen && binary.LittleEndian.Uint16(store) == variableStart {
		nameLen, dataLen := uint64(binary.LittleEndian.Uint32(store[36:])), uint64(binary.LittleEndian.Uint32(store[40:]))
		if nameLen < 2 || nameLen > maxVariableName || nameLen%2 != 0 || variableLen+nameLen+dataLen > uint64(len(store)) {
			return nil, fmt.Errorf("variable with a name of %d bytes and data of %d", nameLen, dataLen)
		}
		name, data := store[variableLen:variableLen+nameLen], store[variableLen+nameLen:variableLen+nameLen+dataLen]
		if store[2] == variableAdded {
			list = append(list, Variable{fromUCS2(name[:nameLen-2]), GUID(store[44:60]), binary.LittleEndian.Uint32(store[4:]), bytes.Clone(data)})
		}
		size := variableLen + nameLen + dataLen
		size += (variableAlign - size%variableAlign) % variableAlign
		store = store[min(size, uint64(len(store))):]
	}
	return list, nil
}

func (v Variable) encode() []byte {
	name := append(ucs2(v.Name), 0, 0)
	b := binary.LittleEndian.AppendUint16(nil, variableStart)
	b = append(b, variableAdded, 0)
	b = binary.LittleEndian.AppendUint32(b, v.Attributes)
	b = append(b, make([]byte, 8+16+4)...)                       // monotonic count, time stamp, public key index
	b = binary.LittleEndian.AppendUint32(b, uint32(len(name)))   //nolint:gosec // bounded by the store
	b = binary.LittleEndian.AppendUint32(b, uint32(len(v.Data))) //nolint:gosec // as above
	b = append(b, v.Vendor[:]...)
	b = append(b, name...)
	b = append(b, v.Data...)
	for len(b)%variableAlign != 0 {
		b = append(b, 0xff)
	}
	return b
}

func fromUCS2(b []byte) string {
	var u []uint16
	for i := 0; i+1 < len(b); i += 2 {
		u = append(u, binary.LittleEndian.Uint16(b[i:]))
	}
	return string(utf16.Decode(u))
}

// SPDX-License-Identifier: Apache-2.0

package source

import (
	"debug/dwarf"
	"debug/elf"
	"fmt"
	"os"
	"slices"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
)

// wanted are the members of the kernel's structures that we read.
var wanted = map[string][]string{
	"klp_patch":     {"objs", "replace"},
	"klp_object":    {"name", "funcs", "callbacks"},
	"klp_func":      {"old_name", "new_func", "old_sympos"},
	"klp_callbacks": queue.CallbackTimes,
}

// readLayout finds the structures, and the names of all variables of type
// struct klp_patch.
func (f *file) readLayout() (layout, []string, error) {
	l := layout{members: map[string]int64{}}
	sizes := map[string]int64{}
	var names []string
	err := eachEntry(f.info, func(r *dwarf.Reader, e *dwarf.Entry, _ int) error {
		name, _ := e.Val(dwarf.AttrName).(string)
		switch e.Tag {
		case dwarf.TagStructType:
			if wanted[name] == nil || sizes[name] != 0 || e.Val(dwarf.AttrDeclaration) != nil {
				return nil
			}
			t, err := f.info.Type(e.Offset)
			if err != nil {
				return err
			}
			s, ok := t.(*dwarf.StructType)
			if !ok {
				return nil
			}
			sizes[name] = s.ByteSize
			for _, m := range s.Field {
				if slices.Contains(wanted[name], m.Name) && m.ByteOffset >= 0 && m.ByteOffset < s.ByteSize {
					l.members[name+"."+m.Name] = m.ByteOffset
				}
			}
		case dwarf.TagVariable:
			at, ok := e.Val(dwarf.AttrType).(dwarf.Offset)
			if !ok || name == "" || e.Val(dwarf.AttrDeclaration) != nil {
				return nil
			}
			t, err := f.info.Type(at)
			if err != nil {
				return err
			}
			if isPatch(t) {
				names = append(names, name)
			}
		default:
		}
		return nil
	})
	if err != nil {
		return l, nil, err
	}
	for s, members := range wanted {
		for _, m := range members {
			if _, ok := l.members[s+"."+m]; !ok && len(names) > 0 {
				return l, nil, fault.New(fault.Internal, "bad_module", "debug information of the module has no member %s of struct %s", m, s)
			}
		}
		if len(names) > 0 && (sizes[s] < 8 || sizes[s] > 1<<16) {
			return l, nil, fault.New(fault.Internal, "bad_module", "struct %s has %d bytes", s, sizes[s])
		}
	}
	l.patch, l.object, l.function, l.callbacks = sizes["klp_patch"], sizes["klp_object"], sizes["klp_func"], sizes["klp_callbacks"]
	return l, names, nil
}

// isPatch says whether a variable is a struct klp_patch, or holds some.
func isPatch(t dwarf.Type) bool {
	for range 16 { // typedefs of typedefs
		switch x := t.(type) {
		case *dwarf.TypedefType:
			t = x.Type
		case *dwarf.QualType:
			t = x.Type
		case *dwarf.ArrayType:
			t = x.Type
		case *dwarf.StructType:
			return x.StructName == "klp_patch"
		default:
			return false
		}
	}
	return false
}

// eachEntry visits all entries of debug information, with their depth.
func eachEntry(d *dwarf.Data, visit func(r *dwarf.Reader, e *dwarf.Entry, depth int) error) (err error) {
	defer func() { // debug/dwarf is not made for hostile files
		if p := recover(); p != nil {
			err = fault.New(fault.Internal, "bad_dwarf", "debug information: %v", p)
		}
	}()
	r := d.Reader()
	depth := 0
	for range maxDIEs {
		e, err := r.Next()
		if err != nil {
			return fmt.Errorf("debug information: %w", err)
		}
		if e == nil {
			return nil
		}
		if e.Tag == 0 {
			depth--
			continue
		}
		if err := visit(r, e, depth); err != nil {
			return err
		}
		if e.Children {
			depth++
		}
	}
	return fault.New(fault.Internal, "bad_dwarf", "debug information has over %d entries", maxDIEs)
}

// functions is what debug information says of the functions of an object.
type functions struct {
	prototypes map[string][]string // several functions may share a name
	inlined    map[string]bool     // has copies in other functions
}

func readFunctions(d *dwarf.Data, names []string) (functions, error) {
	fs := functions{map[string][]string{}, map[string]bool{}}
	at := map[dwarf.Offset]string{}
	var copies []dwarf.Offset
	var open *prototype
	depthOf := 0
	flush := func() {
		if open != nil {
			fs.prototypes[open.name] = append(fs.prototypes[open.name], open.String())
			open = nil
		}
	}
	err := eachEntry(d, func(_ *dwarf.Reader, e *dwarf.Entry, depth int) error {
		if open != nil && depth <= depthOf {
			flush()
		}
		switch e.Tag {
		case dwarf.TagSubprogram:
			name, _ := e.Val(dwarf.AttrName).(string)
			if !slices.Contains(names, name) || e.Val(dwarf.AttrDeclaration) != nil {
				return nil
			}
			at[e.Offset] = name
			result, err := describe(d, e)
			if err != nil {
				return err
			}
			open, depthOf = &prototype{name: name, result: result}, depth
		case dwarf.TagFormalParameter:
			if open == nil || depth != depthOf+1 {
				return nil
			}
			p, err := describe(d, e)
			if err != nil {
				return err
			}
			open.parameters = append(open.parameters, p)
		case dwarf.TagUnspecifiedParameters:
			if open != nil && depth == depthOf+1 {
				open.parameters = append(open.parameters, "...")
			}
		case dwarf.TagInlinedSubroutine:
			if o, ok := e.Val(dwarf.AttrAbstractOrigin).(dwarf.Offset); ok {
				copies = append(copies, o)
			}
		default:
		}
		return nil
	})
	if err != nil {
		return fs, err
	}
	flush()
	for _, o := range copies {
		if n, ok := at[o]; ok {
			fs.inlined[n] = true
		}
	}
	return fs, nil
}

type prototype struct {
	name, result string
	parameters   []string
}

func (p prototype) String() string { return p.result + " (" + strings.Join(p.parameters, ", ") + ")" }

// describe names the type of an entry so that two compilations of the same
// declaration give the same words.
func describe(d *dwarf.Data, e *dwarf.Entry) (string, error) {
	at, ok := e.Val(dwarf.AttrType).(dwarf.Offset)
	if !ok {
		return "void", nil
	}
	t, err := d.Type(at)
	if err != nil {
		return "", fmt.Errorf("debug information: %w", err)
	}
	return typeName(t, 0), nil
}

// maxTypeDepth ends the description of a type that leads to itself.
const maxTypeDepth = 16

// typeName resolves typedefs of plain numbers: u32 and unsigned int are one
// type. Qualifiers count: a const that is gone is a change that a reviewer sees.
func typeName(t dwarf.Type, depth int) string {
	if depth > maxTypeDepth {
		return "?"
	}
	switch x := t.(type) {
	case *dwarf.PtrType:
		return typeName(x.Type, depth+1) + " *"
	case *dwarf.QualType:
		return x.Qual + " " + typeName(x.Type, depth+1)
	case *dwarf.TypedefType:
		if s, ok := x.Type.(*dwarf.StructType); ok && s.StructName == "" {
			return x.Name
		}
		return typeName(x.Type, depth+1)
	case *dwarf.StructType:
		return x.Kind + " " + x.StructName
	case *dwarf.EnumType:
		return "enum " + x.EnumName
	case *dwarf.FuncType:
		var ps []string
		for _, p := range x.ParamType {
			ps = append(ps, typeName(p, depth+1))
		}
		result := "void"
		if x.ReturnType != nil {
			result = typeName(x.ReturnType, depth+1)
		}
		return result + " (" + strings.Join(ps, ", ") + ")"
	case *dwarf.ArrayType:
		return fmt.Sprintf("%s [%d]", typeName(x.Type, depth+1), x.Count)
	case nil:
		return "void"
	default:
		return t.String()
	}
}

// functionsOf reads an object file of the kernel.
func functionsOf(path string, names []string) (functions, error) {
	st, err := os.Stat(path)
	if err != nil {
		return functions{}, err
	}
	if st.Size() > livepatch.MaxModule {
		return functions{}, fault.New(fault.Internal, "bad_object", "%s has %d bytes", path, st.Size())
	}
	f, err := elf.Open(path)
	if err != nil {
		return functions{}, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	d, err := f.DWARF()
	if err != nil {
		return functions{}, fmt.Errorf("debug information of %s: %w", path, err)
	}
	return readFunctions(d, names)
}

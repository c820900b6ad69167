package sysfs

// SetWrite puts a kernel behind the files of a recorded tree.
func (b *Binder) SetWrite(write func(path, data string) error) { b.write = write }

// WriteFile is what the binder of a machine writes with.
var WriteFile = writeFile

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// percentiles is how the name of a file of percentiles ends.
const percentiles = ".hgrm"

var errOneHistogram = errors.New("--hdr: expected a single measurement for a file of percentiles (.hgrm), and a log (any other name) for several")

// hdrFile takes histograms in the formats of the HdrHistogram tools: a log
// with a tagged histogram of nanoseconds for each measurement, or the
// percentiles, in microseconds, of one.
type hdrFile struct {
	file *os.File
	log  *hdrhistogram.HistogramLogWriter // nil: percentiles
}

func createHDR(name, title string) (*hdrFile, error) {
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	h := &hdrFile{file: f}
	if strings.HasSuffix(name, percentiles) {
		return h, nil
	}
	h.log = hdrhistogram.NewHistogramLogWriter(f)
	for _, write := range []func() error{
		func() error { return h.log.OutputComment("ivsh-pingpong: round trips in nanoseconds, " + title) },
		h.log.OutputLogFormatVersion,
		func() error { return h.log.OutputStartTime(time.Now().UnixMilli()) },
		h.log.OutputLegend,
	} {
		if err := write(); err != nil {
			f.Close()
			return nil, err
		}
	}
	return h, nil
}

func (h *hdrFile) add(r *record) error {
	if r.hist == nil {
		return nil
	}
	if h.log == nil {
		_, err := r.hist.PercentilesPrint(h.file, 5, 1e3)
		return err
	}
	end := time.Now()
	r.hist.SetTag(fmt.Sprintf("%s-%s-%d-round%d", r.Over, r.Mode, r.Size, r.Round))
	r.hist.SetEndTimeMs(end.UnixMilli())
	r.hist.SetStartTimeMs(end.Add(-time.Duration(r.Seconds * 1e9)).UnixMilli())
	return h.log.OutputIntervalHistogram(r.hist)
}

func (h *hdrFile) close() error { return h.file.Close() }

package main

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// line is how a series is drawn: ours in colours, the others in greys and
// dashed, so that a print in black and white tells them apart too.
type line struct {
	over, mode, label string
	color             color.RGBA
	width             vg.Length
	dashes            []vg.Length
	shape             draw.GlyphDrawer
}

var (
	blue   = color.RGBA{0, 90, 156, 255}
	green  = color.RGBA{0, 130, 95, 255}
	orange = color.RGBA{196, 88, 0, 255}
	dark   = color.RGBA{60, 60, 60, 255}
	middle = color.RGBA{110, 110, 110, 255}
	light  = color.RGBA{150, 150, 150, 255}

	dashed = []vg.Length{7, 3}
	dotted = []vg.Length{2, 3}
	mixed  = []vg.Length{8, 3, 2, 3}
)

func ours(over string) []line {
	return []line{
		{over, "poll", over + ", poll", blue, 2.2, nil, draw.CircleGlyph{}},
		{over, "adaptive", over + ", adaptive", green, 2.2, nil, draw.BoxGlyph{}},
		{over, "interrupt", over + ", interrupt", orange, 2.2, nil, draw.PyramidGlyph{}},
	}
}

func newPlot(title, x, y string) *plot.Plot {
	sans := font.Font{Typeface: "Liberation", Variant: "Sans"}
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.Padding = 10
	p.Title.TextStyle.Font = font.From(sans, 15)
	for _, axis := range []*plot.Axis{&p.X, &p.Y} {
		axis.Label.TextStyle.Font = font.From(sans, 13)
		axis.Label.Padding = 6
		axis.Tick.Label.Font = font.From(sans, 12)
		axis.LineStyle.Width = 0.8
		axis.Tick.LineStyle.Width = 0.8
		axis.Padding = 0
	}
	p.Legend.TextStyle.Font = font.From(sans, 12)
	p.Legend.Padding = 5
	p.Legend.ThumbnailWidth = 34
	grid := plotter.NewGrid()
	grid.Vertical.Color = color.Gray{205}
	grid.Horizontal.Color = color.Gray{205}
	p.Add(grid)
	return p
}

// save draws the plot and, right of it, its legend.
func save(p *plot.Plot, legend plot.Legend, name string) error {
	const width, height, side = 860, 460, 210
	c, err := draw.NewFormattedCanvas(width, height, strings.TrimPrefix(filepath.Ext(name), "."))
	if err != nil {
		return err
	}
	all := draw.New(c)
	all.SetColor(color.White)
	all.Fill(all.Rectangle.Path())
	p.Draw(draw.Crop(all, 10, -side, 10, -10))
	legend.Top, legend.Left = true, true
	legend.Draw(draw.Crop(all, width-side+8, -6, 10, -44))
	var out bytes.Buffer
	if _, err := c.WriteTo(&out); err != nil {
		return err
	}
	// Where that font is not there, another one of its width.
	text := strings.ReplaceAll(out.String(), "font-family:Liberation Sans;", "font-family:Liberation Sans,Arial,Helvetica,sans-serif;")
	return os.WriteFile(name, []byte(text), 0o644)
}

func (l line) style() draw.LineStyle {
	return draw.LineStyle{Color: l.color, Width: l.width, Dashes: l.dashes}
}

func newLegend(p *plot.Plot) plot.Legend {
	legend := plot.NewLegend()
	legend.TextStyle = p.Legend.TextStyle
	legend.ThumbnailWidth = p.Legend.ThumbnailWidth
	legend.Padding = p.Legend.Padding
	legend.YPosition = draw.PosCenter
	return legend
}

// nines is the axis of percentiles: each step is a tenth of those above.
func nines(percentile float64) float64 { return -math.Log10(1 - percentile/100) }

const picturedSize = 64 // bytes of the messages of the latency picture

func (p *page) drawLatency(name string) error {
	plt := newPlot(fmt.Sprintf("Round trips of %d bytes between two processes", picturedSize), "percentile of the round trips", "round trip time")
	var xs []plot.Tick
	for _, v := range []float64{0, 50, 90, 99, 99.9, 99.99} {
		xs = append(xs, plot.Tick{Value: nines(v), Label: fmt.Sprintf("%g %%", v)})
	}
	plt.X.Tick.Marker = plot.ConstantTicks(xs)
	plt.X.Min, plt.X.Max = 0, nines(99.99)
	plt.Y.Scale = plot.LogScale{}
	legend := newLegend(plt)
	lo, hi := math.Inf(1), 0.0
	for _, l := range append(ours("messages"),
		line{"memory", "poll", "shared memory, looking", dark, 1.4, dashed, nil},
		line{"eventfd", "thread", "memory and eventfd", middle, 1.4, dashed, nil},
		line{"pipe", "thread", "pipe", dark, 1.4, dotted, nil},
		line{"unix", "thread", "Unix socket", dark, 1.4, mixed, nil},
		line{"tcp-go", "poller", "net.TCPConn, loopback", light, 1.8, nil, nil},
	) {
		h := p.hists[fmt.Sprintf("%s-%s-%d", l.over, l.mode, picturedSize)]
		if h == nil {
			return fmt.Errorf("picture of latencies: nothing was measured over %s, mode %s", l.over, l.mode)
		}
		var points plotter.XYs
		for x := 0.0; x <= nines(99.99)+1e-9; x += 0.02 {
			q := 100 * (1 - math.Pow(10, -x))
			points = append(points, plotter.XY{X: x, Y: float64(h.ValueAtQuantile(q))})
		}
		lo, hi = min(lo, points[0].Y), max(hi, points[len(points)-1].Y)
		drawn, err := plotter.NewLine(points)
		if err != nil {
			return err
		}
		drawn.LineStyle = l.style()
		plt.Add(drawn)
		legend.Add(l.label, drawn)
	}
	plt.Y.Min, plt.Y.Max = decades(lo, hi)
	plt.Y.Tick.Marker = logTicks(plt.Y.Min, plt.Y.Max, func(ns float64) string {
		return strings.NewReplacer(".00", "", ".0", "").Replace(duration(ns)) // 1, 2 or 5 of a unit
	})
	return save(plt, legend, name)
}

func (p *page) drawThroughput(name string) error {
	plt := newPlot("Throughput one way between two processes, a call for each message", "size of a message", "throughput, GB/s")
	plt.X.Scale, plt.Y.Scale = plot.LogScale{}, plot.LogScale{}
	var ticks []plot.Tick
	var sizes []int
	for _, s := range p.throughput {
		if !slices.Contains(sizes, s.Size) {
			sizes = append(sizes, s.Size)
			ticks = append(ticks, plot.Tick{Value: float64(s.Size), Label: bytesOf(s.Size)})
		}
	}
	slices.Sort(sizes)
	plt.X.Tick.Marker = plot.ConstantTicks(ticks)
	legend := newLegend(plt)
	lo, hi := math.Inf(1), 0.0
	for _, l := range append(ours("conn"),
		line{"memory", "poll", "memcpy, shared memory", dark, 1.4, dashed, draw.CrossGlyph{}},
		line{"pipe", "thread", "pipe", dark, 1.4, dotted, draw.PlusGlyph{}},
		line{"unix", "thread", "Unix stream socket", middle, 1.4, mixed, draw.RingGlyph{}},
		line{"seqpacket", "thread", "Unix seqpacket socket", light, 1.4, dashed, draw.SquareGlyph{}},
		line{"tcp", "thread", "TCP, loopback", light, 1.8, nil, draw.TriangleGlyph{}},
	) {
		points := spread{}
		for _, size := range sizes {
			s := p.throughput.find(l.over, l.mode, size)
			if s == nil {
				continue
			}
			all := s.of(gigabytes)
			mid := median(all)
			points.XYs = append(points.XYs, plotter.XY{X: float64(size), Y: mid})
			points.YErrors = append(points.YErrors, struct{ Low, High float64 }{mid - slices.Min(all), slices.Max(all) - mid})
			lo, hi = min(lo, slices.Min(all)), max(hi, slices.Max(all))
		}
		if len(points.XYs) == 0 {
			return fmt.Errorf("picture of throughput: nothing was measured over %s, mode %s", l.over, l.mode)
		}
		drawn, marks, err := plotter.NewLinePoints(points.XYs)
		if err != nil {
			return err
		}
		drawn.LineStyle = l.style()
		marks.GlyphStyle = draw.GlyphStyle{Color: l.color, Radius: 3.2, Shape: l.shape}
		bars, err := plotter.NewYErrorBars(points)
		if err != nil {
			return err
		}
		bars.LineStyle.Color, bars.LineStyle.Width, bars.CapWidth = l.color, 0.7, 4
		plt.Add(bars, drawn, marks)
		legend.Add(l.label, drawn, marks)
	}
	plt.X.Min, plt.X.Max = float64(sizes[0])/1.3, float64(sizes[len(sizes)-1])*1.3
	plt.Y.Min, plt.Y.Max = decades(lo, hi)
	plt.Y.Tick.Marker = logTicks(plt.Y.Min, plt.Y.Max, func(v float64) string { return fmt.Sprintf("%g", v) })
	return save(plt, legend, name)
}

type spread struct {
	plotter.XYs
	plotter.YErrors
}

func gigabytes(r record) float64 { return r.BytesPerS / 1e9 }

// decades is the range of an axis: whole parts 1, 2, 5 of its decades.
func decades(lo, hi float64) (float64, float64) {
	step := func(v float64, up bool) float64 {
		decade := math.Pow(10, math.Floor(math.Log10(v)))
		steps := []float64{1, 2, 5, 10}
		for i, s := range steps {
			if up && v <= s*decade*1.0001 {
				return s * decade
			}
			if !up && i+1 < len(steps) && v < steps[i+1]*decade {
				return s * decade
			}
		}
		return v
	}
	return step(lo, false), step(hi, true)
}

// logTicks labels 1 of each decade and marks 2 to 9; where there are few
// decades, 2 and 5 are labelled too.
func logTicks(lo, hi float64, label func(float64) string) plot.ConstantTicks {
	var ticks plot.ConstantTicks
	few := hi/lo < 2e3
	for decade := math.Pow(10, math.Floor(math.Log10(lo)+1e-9)); decade <= hi*1.001; decade *= 10 {
		for i := 1.0; i < 10; i++ {
			v := i * decade
			if v < lo*0.999 || v > hi*1.001 {
				continue
			}
			t := plot.Tick{Value: v}
			if i == 1 || few && (i == 2 || i == 5) {
				t.Label = label(v)
			}
			ticks = append(ticks, t)
		}
	}
	return ticks
}

// duration prints nanoseconds with up to three significant digits.
func duration(ns float64) string {
	unit, name := 1.0, "ns"
	switch {
	case ns >= 999.5e6:
		unit, name = 1e9, "s"
	case ns >= 999.5e3:
		unit, name = 1e6, "ms"
	case ns >= 999.5:
		unit, name = 1e3, "µs"
	}
	return digits(ns/unit) + " " + name
}

// digits prints three significant digits of a number below 1000.
func digits(v float64) string {
	switch {
	case v >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case v >= 9.995:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func bytesOf(size int) string {
	switch {
	case size >= 1<<20 && size%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", size>>20)
	case size >= 1<<10 && size%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", size>>10)
	}
	return fmt.Sprintf("%d B", size)
}
